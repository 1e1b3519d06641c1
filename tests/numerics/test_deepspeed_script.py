"""A script as those written for DeepSpeed, under torchrun: the same numbers at every stage, and what it saved."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import ROOT
from tests.harness.waiting import patient

SCRIPT = ROOT / "tests" / "data" / "deepspeed_script.py"


def run(stage: int, folder: Path) -> dict[str, object]:
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", port, str(SCRIPT), "--deepspeed", "--deepspeed_config", str(folder / "ds_config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--save", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(110),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return run(0, tmp_path_factory.mktemp("scripts") / "0")


@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_gives_the_same(stage: int, reference: dict[str, object], tmp_path: Path) -> None:
    found = run(stage, tmp_path / "run")
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert found["total"] == pytest.approx(reference["total"], abs=1e-3)
    assert found["client_state"] == {"epoch": 1} and found["zero"] == stage
    assert {key: found[key] for key in ("steps", "micro", "lr")} == {
        key: reference[key] for key in ("steps", "micro", "lr")
    }
    whole = torch.load(tmp_path / "run" / "whole.bin", weights_only=True)
    assert sum(value.double().sum().item() for value in whole.values()) == pytest.approx(found["total"])
