"""Configs as people and tools write them for DeepSpeed: Hjson, and base64 text between processes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from runtime.config import ConfigError, load

PLAIN = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
    "zerotop": {"data": {"files": ["a # b", "it's"], "tokenizer": "/x/y"}},
}

WRITTEN = {
    "comments": """{
  # how to train
  "train_micro_batch_size_per_gpu": 4, // per rank
  "bf16": {"enabled": false}, /* on
     H200s */ "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
  "zerotop": {"data": {"files": ["a # b", "it's"], "tokenizer": "/x/y"}}
}""",
    "trailing commas": """{"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": false,},
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95,],},},
  "zerotop": {"data": {"files": ["a # b", "it's",], "tokenizer": "/x/y",},},
}""",
    "no quotes, no commas": """{
  train_micro_batch_size_per_gpu: 4
  bf16: {enabled: false}
  optimizer: {
    type: AdamW
    params: {lr: 3e-4, betas: [
      0.9
      0.95
    ]}
  }
  zerotop: {data: {files: ["a # b", "it's"], tokenizer: '/x/y'}}
}""",
    "no outer braces": """train_micro_batch_size_per_gpu: 4
bf16: {enabled: false}
'optimizer': {type: 'AdamW', params: {lr: 3e-4, betas: [0.9, 0.95]}}
zerotop: {data: {files: ['''a # b''', 'it\\'s'], tokenizer: "/x/y"}}
""",
}


@pytest.mark.parametrize("how", list(WRITTEN))
def test_hjson_says_the_same(tmp_path: Path, how: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(WRITTEN[how])
    assert load(path).model_dump() == load(PLAIN).model_dump()
    assert load(path).raw == PLAIN


def test_keys_of_hjson_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{\n # one\n bf16: {\n  enabled: 3 // no\n }\n fp16: {}\n fp16: {}\n}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.problems == ["line 7: fp16 is given twice (first on line 6)"]
    path.write_text("{\n # one\n bf16: {\n  enabled: 3 // no\n }\n}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.problems == ["line 4: bf16.enabled: expected true or false, got 3"]


def test_base64_text() -> None:
    text = base64.urlsafe_b64encode(json.dumps(PLAIN).encode()).decode()
    assert load(text).raw == PLAIN
    assert load(text).origin == "config" and load(text).folder == Path.cwd()
    with pytest.raises(ConfigError) as caught:
        load(base64.urlsafe_b64encode(b"no config").decode())
    assert caught.value.problems == ["no such file"]
