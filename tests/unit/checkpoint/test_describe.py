"""What a checkpoint says of its model: Hugging Face's config, the built-in GPT's, the tokenizer's files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.checkpoint.content import describe
from runtime.checkpoint.content.describe import describe_model
from runtime.config.presets import GPTConfig
from runtime.models.gpt import GPT


def given(module: Any, tokenizer: str = "bytes", run: Any = None) -> tuple[Any, Any, Any]:
    """What a description is made of: model, config and run."""
    config = SimpleNamespace(zerotop=SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer)))
    return module, config, run


def linear(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_a_plain_module_has_nothing_to_say() -> None:
    for config in (None, {"dim": 3}, GPTConfig(1, 1, 2, 3, 4), SimpleNamespace(to_dict="no function")):
        assert describe_model(*given(linear(config=config))) == {}


def test_a_config_is_written_by_either_of_its_methods() -> None:
    for config in (
        SimpleNamespace(to_json_string=lambda: '{"model_type": "x", "architectures": ["Linear"]}'),
        SimpleNamespace(to_dict=lambda: {"model_type": "x", "architectures": ["Linear"]}),
    ):
        files = describe_model(*given(linear(config=config)))
        assert json.loads(files["config.json"]) == {"model_type": "x", "architectures": ["Linear"]}


def test_a_config_whose_model_is_somewhere_inside_says_where_and_one_of_another_model_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = SimpleNamespace(to_dict=lambda: {"model_type": "x", "architectures": ["Linear"]})
    wrapper = torch.nn.Module()
    wrapper.config, wrapper.base = config, torch.nn.ModuleDict({"model": linear()})
    files = describe_model(*given(wrapper))
    assert json.loads(files["config.json"])["zerotop_prefix"] == "base.model."
    stranger = torch.nn.Bilinear(2, 2, 2)
    stranger.config = config
    with caplog.at_level(logging.WARNING):
        assert describe_model(*given(stranger)) == {}
    assert "Bilinear.config describes a Linear, which the model lacks" in caplog.text


def test_a_config_that_fails_costs_no_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> str:
        raise RuntimeError("not today")

    with caplog.at_level(logging.WARNING):
        assert describe_model(*given(linear(config=SimpleNamespace(to_json_string=fails)))) == {}
        assert describe_model(*given(linear(config=SimpleNamespace(to_dict=lambda: {"dtype": torch.bfloat16})))) == {}
    assert "checkpoints are saved without Linear.config, as it can't be written as JSON: not today" in caplog.text
    assert "not JSON serializable" in caplog.text


def test_the_built_in_gpt_says_all_that_builds_it_and_what_its_tokens_are() -> None:
    shape = GPTConfig(layers=1, heads=2, dim=8, vocab_size=320, max_seq_len=4, tied=True)
    trainer, script = (SimpleNamespace(script=script, config_folder="/") for script in (None, ["train.py"]))
    config = json.loads(describe_model(*given(GPT(shape, "meta"), run=trainer))["config.json"])
    assert config["model_type"] == "zerotop-gpt" and GPTConfig(**config["zerotop_gpt"]) == shape
    assert config["zerotop_tokenizer"].startswith("bytes:")
    by_script = json.loads(describe_model(*given(GPT(shape, "meta"), run=script))["config.json"])
    assert "zerotop_tokenizer" not in by_script  # a script has its own text


def test_a_tokenizer_is_a_folder_or_a_file_relative_to_the_config(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "special_tokens_map.json", "merges.txt", "model.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "mine.json").write_text("mine")
    run = SimpleNamespace(script=None, config_folder=str(tmp_path))
    folder = describe_model(*given(linear(), ".", run))
    assert folder == {n: n.encode() for n in ("tokenizer.json", "special_tokens_map.json", "merges.txt")}
    file = describe_model(*given(linear(), "mine.json", run))
    assert file == {"tokenizer.json": b"mine", "special_tokens_map.json": b"special_tokens_map.json"}


def test_a_tokenizer_that_is_gone_or_huge_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        assert describe_model(*given(linear(), str(tmp_path / "gone"))) == {}
    assert f"no tokenizer at {tmp_path / 'gone'}" in caplog.text
    monkeypatch.setattr(describe, "TOKENIZER_LIMIT_BYTES", 1 << 20)
    (tmp_path / "tokenizer.json").write_bytes(bytes(2 << 20))
    with caplog.at_level(logging.WARNING):
        assert describe_model(*given(linear(), str(tmp_path))) == {}
    assert "its files have 2 MiB, more than 1" in caplog.text
