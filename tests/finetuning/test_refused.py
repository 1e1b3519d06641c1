"""Configs, models and data that cannot be used: one clear message, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError, load
from runtime.data import DataError
from tests.harness.packages import needs
from tests.harness.tiny_chat import save_chat_model, write_dialogues

needs("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused(section_changes)`: the message with which preparation refuses the config."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dialogues(tmp_path / "chats.jsonl", 10)

    def message(**changes: Any) -> str:
        from runtime.trainer.build import check_model
        from runtime.trainer.prepare import prepare

        section: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"files": ["chats.jsonl"], "seq_len": 128, "workers": 1},
        }
        for key, value in changes.items():
            section[key] = {**section.get(key, {}), **value}
        with pytest.raises((ConfigError, DataError)) as caught:
            config = load({"train_micro_batch_size_per_gpu": 1, "zerotop": section}).resolve(1, "cpu")
            ready = prepare(config.zerotop, tmp_path, lambda line: None)
            check_model(config, ready.config, len(ready.tokenizer), ready.folder)
        return str(caught.value)

    return message


def rows(path: Path, *found: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found))
    return path


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_base_model_without_chat_template(refused: Callable[..., str], tmp_path: Path) -> None:
    base = save_chat_model(tmp_path / "base", template=None)
    found = refused(model={"path": str(base)})
    assert "zerotop.data.chat_template" in found and "no chat template" in found


def test_rows_without_an_answer(refused: Callable[..., str], tmp_path: Path) -> None:
    rows(tmp_path / "asked.jsonl", chat(("user", "Hello?")), chat(("user", "Anybody?")))
    found = refused(data={"files": ["asked.jsonl"]})
    assert "all 2 rows were left out (no assistant turn: 2)" in found


def test_a_broken_line(refused: Callable[..., str], tmp_path: Path) -> None:
    rows(tmp_path / "broken.jsonl", chat(("user", "a"), ("assistant", "b")), '{"messages": [', "nothing", "{")
    found = refused(data={"files": ["broken.jsonl"]})
    assert "broken.jsonl" in found and "line 2" in found and "2 more" in found


def test_an_empty_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(data={"files": ["empty.jsonl"]})


def test_columns_that_are_no_known_format(refused: Callable[..., str], tmp_path: Path) -> None:
    rows(tmp_path / "odd.jsonl", {"question": "a", "reply": "b"})
    found = refused(data={"files": ["odd.jsonl"]})
    assert "question" in found and "reply" in found and "messages" in found


def test_longer_sequences_than_positions(refused: Callable[..., str]) -> None:
    assert "zerotop.data.seq_len: expected at most 256" in refused(data={"seq_len": 257})


def test_a_larger_vocabulary_than_the_embedding(refused: Callable[..., str], tmp_path: Path) -> None:
    small = save_chat_model(tmp_path / "small", vocab_size=128)
    found = refused(model={"path": str(small)})
    assert "zerotop.data.tokenizer" in found and "128 rows" in found


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_without_a_backward_on_the_cpu(refused: Callable[..., str], attention: str) -> None:
    found = refused(model={"attention": attention})
    assert f'zerotop.model.attention: "{attention}" trains on GPUs only, and this run is on the CPU' in found


def test_compiling_without_a_compiler(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = refused(model={"compile": True})
    assert found.startswith("zerotop.model.compile: ") and "no-such-compiler" in found


def test_a_missing_shard(refused: Callable[..., str], tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in refused(model={"path": str(folder)})


def test_adapters_that_match_nothing(refused: Callable[..., str]) -> None:
    found = refused(lora={"target_modules": ["q_porj"]})
    assert "zerotop.lora.target_modules" in found and "q_proj" in found


def test_new_tokens_beside_a_frozen_embedding(refused: Callable[..., str]) -> None:
    found = refused(model={"new_tokens": ["<|think|>"]}, lora={"r": 4})
    assert found.startswith("zerotop.model.new_tokens: ") and '"modules_to_save": ["embed_tokens"]' in found


def test_quantized_training_is_refused_with_a_way_out(refused: Callable[..., str]) -> None:
    found = refused(lora={"load_in_4bit": True})
    assert "QLoRA" in found and "offload_param" in found


def test_launch_says_so_and_starts_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from zerotop.cli import main

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "chats.jsonl").write_text("{\n")
    config = tmp_path / "config.json"
    section = {"model": {"path": str(model)}, "data": {"files": ["chats.jsonl"], "seq_len": 128}}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zerotop": section}))
    assert main(["launch", str(config), "--no-screen", "--device", "cpu"]) == 2
    told = capfd.readouterr().err
    assert "chats.jsonl" in told and "line 1" in told and "Traceback" not in told
    assert not list((tmp_path / "state").rglob("run.json"))
