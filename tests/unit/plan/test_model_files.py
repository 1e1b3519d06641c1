"""Finding a Hugging Face model without network or huggingface_hub, and reading no more than headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from runtime.config.presets import ModelError
from runtime.plan.model_files import cache_folder, read_model
from tests.harness.model_headers import write_header

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    write_header(folder / "model.safetensors", {"model.embed_tokens.weight": [8, 4], "model.norm.weight": [4]})
    return folder


def test_a_folder_is_relative_to_that_of_the_config(tmp_path: Path) -> None:
    model(tmp_path / "models" / "tiny", hidden_size=4)
    found = read_model("models/tiny", tmp_path)
    assert found.config["hidden_size"] == 4
    assert found.tensors == {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}


def test_files_of_an_index_are_read_together(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    write_header(folder / "model-2.safetensors", {"lm_head.weight": [8, 4]})
    weight_map = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(read_model(str(folder), tmp_path).tensors) == {*weight_map, "model.norm.weight"}
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-2.safetensors that model.safetensors.index.json lists; --model"):
        read_model(str(folder), tmp_path)


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    shapes = {"h.0.attn.bias": [1, 1, 8, 8], "h.0.attn.c_attn.bias": [12], "layers.0.rotary_emb.inv_freq": [2]}
    write_header(model(tmp_path) / "model.safetensors", shapes)
    assert set(read_model(str(tmp_path), tmp_path).tensors) == {"h.0.attn.c_attn.bias"}


# ---- the hub's cache -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, Path("/a")),
        ({"HUGGINGFACE_HUB_CACHE": "/a"}, Path("/a")),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, Path("/b/hub")),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/huggingface/hub")),
        ({}, Path("~/.cache/huggingface/hub").expanduser()),
    ],
)
def test_the_cache_is_where_huggingface_hub_keeps_it(environment: dict[str, str], expected: Path) -> None:
    assert cache_folder(environment) == expected


def test_an_id_on_the_hub_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--some--model"
    folder = model(stored / "snapshots" / COMMIT)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(COMMIT)
    assert read_model("some/model", tmp_path).path == folder
    assert read_model("some/model", tmp_path, COMMIT).path == folder
    with pytest.raises(ModelError, match=r"revision v2 of some/model is not on this machine: .*hf download some/model"):
        read_model("some/model", tmp_path, "v2")


def test_it_agrees_with_huggingface_hub_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    stored = tmp_path / "models--some--model"
    model(stored / "snapshots" / COMMIT)
    (stored / "refs" / "pr").mkdir(parents=True)
    (stored / "refs" / "pr" / "1").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    theirs = hub.snapshot_download("some/model", revision="pr/1", cache_dir=tmp_path, local_files_only=True)
    assert read_model("some/model", tmp_path, "pr/1").path == Path(theirs)


# ---- what cannot be read ---------------------------------------------------------------------------------------------
def test_a_model_that_is_not_here_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=r"some/model is not on this machine: .*or --model 7B plans for a model"):
        read_model("some/model", tmp_path)
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere; --model 7B"):
        read_model("./nowhere", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"[1]", "config.json: expected a JSON object"),
        ("config.json", b'{"quantization_config": {"bits": 4}}', "holds quantized weights"),
        ("model.safetensors", None, "expected model.safetensors.index.json or one .safetensors file"),
        ("model.safetensors", b"\xff" * 64, "is not a safetensors file: its header would have"),
        ("model.safetensors", b"GGUF", "is not a safetensors file"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    path = model(tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        read_model(str(tmp_path), tmp_path)


# ---- GGUF ------------------------------------------------------------------------------------------------------------
def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(version: int = 3) -> bytes:
    """A header with strings, numbers, and arrays of both before the tensors."""
    pairs = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
        string("llama.embedding_length") + struct.pack("<II", 4, 4),
        string("llama.attention.head_count") + struct.pack("<II", 4, 2),
    ]
    shapes = {"token_embd.weight": (4, 8), "blk.0.attn_k.weight": (4, 2), "rope_freqs.weight": (2,)}
    tensors = [
        string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0) for name, shape in shapes.items()
    ]
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    return header + b"".join(pairs) + b"".join(tensors)


def test_a_gguf_file_is_read_in_the_names_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf())
    found = read_model("tiny.gguf", tmp_path)
    assert found.config == {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 8}
    assert found.tensors == {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.self_attn.k_proj.weight": (2, 4),
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is not a GGUF file"), (b"RIFF1234", "does not begin with GGUF"), (gguf(1), "version 2 or 3, got 1")],
)
def test_a_broken_gguf_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        read_model("tiny.gguf", tmp_path)


def test_a_truncated_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf()[:-20])
    with pytest.raises(ModelError, match="is not a GGUF file"):
        read_model("tiny.gguf", tmp_path)
