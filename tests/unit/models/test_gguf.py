"""A GGUF file becomes a folder that transformers and zero.Init read: once, as a whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.config import ConfigError
from runtime.models import gguf as ours
from runtime.models.weights import Weights

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def write(path: Path, dtype: type = np.float32, parts: int = 1, tensors: bool = True) -> dict[str, np.ndarray]:
    """A GGUF file with a tiny model of Llama's architecture; the values of its tensors by GGUF name."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "abc", "d"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    shapes = {
        "token_embd.weight": (8, 64), "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,), "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64), "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
    }  # fmt: skip
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()} if tensors else {}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_folder_has_the_files_tensors_and_what_belongs_to_a_model(tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "tiny.gguf"
    values = write(file, dtype)
    said: list[str] = []
    folder = ours.convert(file, said.append, tmp_path / "cache")
    assert any("once" in line for line in said)
    stored = load_file(folder / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    assert embedding.dtype == (torch.float32 if dtype is np.float32 else torch.float16)
    assert torch.equal(embedding, torch.from_numpy(values["token_embd.weight"]))
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight"], torch.from_numpy(values["blk.0.ffn_down.weight"]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=embedding.dtype).state_dict()
    for name, value in model.state_dict().items():
        assert value.dtype == embedding.dtype and torch.equal(value, whole[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abcd")["input_ids"] == [6, 7]
    assert tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "<s>ab"
    assert (folder / "generation_config.json").is_file()
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert len(Weights.open(folder).names) == len(values)

    said.clear()
    assert ours.convert(file, said.append, tmp_path / "cache") == folder and not said


def test_processes_that_ask_at_once_convert_once(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write(file)
    started, go_on = threading.Event(), threading.Event()
    calls = []

    def slow(path: Path, folder: Path, log: ours.Log) -> None:
        calls.append(path)
        started.set()
        assert go_on.wait(60)
        folder.mkdir()

    monkeypatch.setattr(ours, "_convert", slow)
    first = threading.Thread(target=ours.convert, args=(file, lambda _line: None, tmp_path / "cache"))
    first.start()
    assert started.wait(60)

    def note(line: str) -> None:
        assert "another process" in line
        go_on.set()

    assert ours.convert(file, note, tmp_path / "cache").is_dir()
    first.join()
    assert len(calls) == 1


def test_a_conversion_that_fails_leaves_nothing_and_is_tried_again(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write(file)
    cache = tmp_path / "cache"
    (cache / f"tiny-{ours._digest(file)}.elsewhere-1.part").mkdir(parents=True)  # of one that was killed

    def fail(path: Path, dtype: str) -> None:
        raise ConfigError("cannot")

    with monkeypatch.context() as patched:
        patched.setattr(ours, "_read", fail)
        with pytest.raises(ConfigError, match="cannot"):
            ours.convert(file, lambda _line: None, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert (ours.convert(file, lambda _line: None, cache) / "config.json").is_file()


def test_files_that_are_no_models_are_refused(tmp_path):
    def error(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            ours.convert(path, lambda _line: None, tmp_path / "cache")
        return str(caught.value)

    assert "cannot read" in error(tmp_path / "absent.gguf")
    (other := tmp_path / "other.gguf").write_bytes(b"PK\3\4")
    assert "is not a GGUF file" in error(other)
    write(whole := tmp_path / "whole.gguf")
    (short := tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:2000])
    assert "cut short" in error(short)
    write(part := tmp_path / "part.gguf", parts=3)
    assert "one of 3 parts" in error(part) and "llama-gguf-split" in error(part)
    write(empty := tmp_path / "empty.gguf", tensors=False)
    assert "has no tensors" in error(empty)
