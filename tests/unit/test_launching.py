"""What launch checks before it starts anything."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from runtime.config import ConfigError
from zerotop.runs import launching
from zerotop.runs.paths import runs_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_config_for_one_rank_gets_one_on_a_cpu(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}
    config.write_text(json.dumps(batch))
    assert launching._check(config, None, "cpu", None, (), False, None).nproc == 1
    config.write_text(json.dumps({"train_batch_size": 64}))
    assert launching._check(config, None, "cpu", None, (), False, None).nproc == min(2, os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: expected 0, 1, 2, got 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: not sup"),
        ({"zerotop": {"data": {"tokenizer": "nowhere"}}}, 'tokenizer: expected "bytes", a tokenizer.json'),
        ({"zerotop": {"data": {"files": ["nothing-*.txt"]}}}, '"nothing-*.txt" matches no file'),
        ({"zerotop": {"model": {"path": "some/model"}}}, "zerotop.model.path: Hugging Face models are not supported"),
    ],
)
def test_what_the_ranks_cannot_do_starts_nothing(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **settings}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        launching.start_run(config, device="cpu", name="never")
    assert not (runs_home() / "never").exists()
