"""A rank that dies in the middle: the others say so, not what their sockets saw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.waiting import patient

PROGRAM = """
import os, sys
import torch, torch.distributed as dist
from runtime.comm import Comm
from runtime.telemetry import NullTelemetry

rank, store, op = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
comm = Comm(torch.device("cpu"), NullTelemetry())
comm.gather_objects("here")
if rank == 1:
    os._exit(0)
try:
    for _ in range(3):
        if op == "all_reduce":
            comm.all_reduce(torch.ones(5)).wait()
        else:
            comm.gather_objects("again")
except RuntimeError as error:
    print(type(error).__name__, error, "|", type(error.__cause__).__name__, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("op", ["all_reduce", "gather_objects"])
def test_gloos_words_are_put_into_ours(tmp_path: Path, op: str) -> None:
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(tmp_path / "store"), op], stdout=subprocess.PIPE, text=True, env=environment
        )
        for r in (0, 1)
    ]
    said = [process.communicate(timeout=patient(60))[0] for process in ranks]
    assert said[0].startswith("RankGone another rank is gone ("), said
    assert f"this rank was waiting for it in {op} |" in said[0]
