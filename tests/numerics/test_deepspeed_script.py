"""A script as those written for DeepSpeed gives the same numbers at every stage, and what it saved: under torchrun, and
on ranks that are there already."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.harness import ROOT
from tests.harness.waiting import patient

SCRIPT = ROOT / "tests" / "data" / "deepspeed_script.py"


def words_of(stage: int, folder: Path) -> list[str]:
    """The script's command line, for a new folder with its config."""
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 30, "reduce_bucket_size": 5e7},
        "activation_checkpointing": {"partition_activations": False},
        "steps_per_print": 2000,
    }
    folder.mkdir()
    (folder / "ds_config.json").write_text(json.dumps(config))
    return [str(SCRIPT), "--deepspeed", "--deepspeed_config", str(folder / "ds_config.json"), "--save", str(folder)]


def run_on_a_rank(words: list[str]) -> str:
    """What the script prints, as a part of this rank's process."""
    with patch.object(sys, "argv", words), contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(words[0], run_name="__main__")
    return output.getvalue()


def run_under_torchrun(words: list[str]) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "--master-port", port, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(110),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("stage", "launcher"), [(2, ""), (3, "torchrun")])
def test_every_stage_gives_the_same(ranks, tmp_path, stage, launcher):
    printed = ranks(2).run(run_on_a_rank, words_of(0, tmp_path / "0"))[0]
    reference = json.loads(printed.splitlines()[-1])
    words = words_of(stage, tmp_path / "run")
    printed = run_under_torchrun(words) if launcher else ranks(2).run(run_on_a_rank, words)[0]
    found = json.loads(printed.splitlines()[-1])
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert found["total"] == pytest.approx(reference["total"], abs=1e-3)
    assert found["client_state"] == {"epoch": 1} and found["zero"] == stage
    assert {key: found[key] for key in ("steps", "micro", "lr")} == {
        key: reference[key] for key in ("steps", "micro", "lr")
    }
    whole = torch.load(tmp_path / "run" / "whole.bin", weights_only=True)
    assert sum(value.double().sum().item() for value in whole.values()) == pytest.approx(found["total"])
