"""Hugging Face models that cannot be used are refused with one clear message, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError, ModelConfig
from runtime.models import hub, huggingface
from tests.harness.packages import needs

needs("transformers")

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def folder_with(path: Path, config: dict[str, Any] | str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def refused(path: Path, **section: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        huggingface.load_config(path, ModelConfig(path=str(path), **section))
    return str(caught.value)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches the hub, or finds what somebody has downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# ---- finding the files -----------------------------------------------------------------------------------------------
def test_a_folder_is_relative_to_the_config(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "models" / "tiny", LLAMA)
    assert hub.find_model("models/tiny", tmp_path, None, print) == model
    assert hub.find_model(str(model), Path("/"), None, print) == model


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nothing", "there is no folder"),
        ("/nothing/at/all", "there is no folder /nothing/at/all"),
        ("empty", "has no config.json: expected a folder that save_pretrained()"),
        ("owner/model", "is not in the cache of huggingface_hub, and the hub cannot be reached"),
        ("owner/model/more", "there is no folder"),
    ],
)
def test_a_model_that_is_not_there(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        hub.find_model(path, tmp_path, None, print)
    assert str(caught.value).startswith("zerotop.model.path: ") and message in str(caught.value)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    folder_with(tmp_path / "tiny", LLAMA)
    with pytest.raises(ConfigError, match=r"zerotop.model.revision: tiny is a folder, which has no revisions"):
        hub.find_model("tiny", tmp_path, "main", print)


def test_progress_is_written_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    bar = hub._progress_class("owner/model", lines.append)(total=4 << 20, unit="B", unit_scale=True, name="x")
    monkeypatch.setattr("runtime.models.hub.time.monotonic", lambda: 1e9)
    bar.update(2 << 20)
    bar.display()
    bar.close()
    assert lines[-1].startswith("downloading owner/model: 50% of 4.00 MiB")


# ---- what kind of model ----------------------------------------------------------------------------------------------
def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    broken = refused(folder_with(tmp_path / "broken", "{"))
    assert "config.json cannot be used" in broken
    unknown = refused(folder_with(tmp_path / "unknown", {"model_type": "no-such-model"}))
    assert "config.json cannot be used" in unknown and "\n" not in unknown
    encoder = refused(folder_with(tmp_path / "encoder", {"model_type": "clip", "architectures": ["CLIPModel"]}))
    assert "is a CLIPModel: expected a causal language model" in encoder
    quantized = LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert "holds quantized weights" in refused(folder_with(tmp_path / "quantized", quantized))


def test_a_folder_with_code_of_its_own_is_not_trusted(tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    path = folder_with(tmp_path / "own", own)
    (path / "own.py").write_text("raise SystemExit('this code was run')\n")
    assert 'set "trust_remote_code": true' in refused(path)


def test_longer_sequences_than_the_model_has_positions(tmp_path: Path) -> None:
    config = huggingface.load_config(folder_with(tmp_path, LLAMA), ModelConfig(path="m"))
    huggingface.check_positions(config, 32)
    with pytest.raises(ConfigError, match=r"zerotop.data.seq_len: expected at most 32, .* got 33"):
        huggingface.check_positions(config, 33)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zerotop.data.tokenizer: m has no tokenizer that transformers can read"):
        huggingface.load_tokenizer(folder_with(tmp_path, LLAMA), "m")


def test_an_attention_that_is_not_installed(tmp_path: Path) -> None:
    section = ModelConfig(path="m", attention="flash_attention_3")
    config = huggingface.load_config(folder_with(tmp_path, LLAMA), section)
    with pytest.raises(ConfigError, match=r'zerotop.model.attention: "flash_attention_3" cannot be used'):
        huggingface.build(config, section)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_blocks_are_found(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 64} if kind == "gpt2" else LLAMA
    config = AutoConfig.for_model(kind, **{key: value for key, value in sizes.items() if key != "model_type"})
    model = AutoModelForCausalLM.from_config(config)
    stack = huggingface.blocks(model)
    assert len(stack) == (3 if kind == "gpt2" else 2)
    assert stack is (model.transformer.h if kind == "gpt2" else model.model.layers)
