"""Who is named when a run ends: not the rank that complains, nor the one that happened to speak first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.wire.messages import Event
from runtime.wire.rundir import read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import until
from zerotop.hub.recorder import read_messages

pytestmark = pytest.mark.timeout(240)
DEADLINE_S = 150.0
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {"checkpoint": {"interval": 0}},
}
SCRIPT = """
import os, sys, torch
import runtime as deepspeed

def fork(leave):
    if (child := os.fork()) == 0:
        leave()
    os.waitpid(child, 0)

torch.manual_seed(0)
rank = int(os.environ["RANK"])
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 8))

def train(batch, nan=False):
    loss = engine(batch).square().mean()
    engine.backward(loss + (float("nan") if nan else 0.0))
    engine.step()

train(torch.ones(4, 8))
if rank == 1:
    fork(lambda: sys.exit(0))
    fork(lambda: os._exit(0))
    fork(lambda: 1 / 0)
data = [torch.ones(8)] * 4 * (5 if rank == 1 else 7)
for step, batch in enumerate(torch.utils.data.DataLoader(data, batch_size=4, num_workers=1), 1):
    train(batch, nan=(rank, step) == (1, 4))
"""


def test_forked_children_are_not_noticed_and_a_rank_with_less_data_is_the_cause(
    launch_real: Callable[..., StartedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("a folder whose name leaves a socket no room " * 3)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))  # the workers' batches come over Unix sockets in there
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    run = launch_real(CONFIG, script=[str(script)])
    run.see_end("failed", DEADLINE_S)
    until(run.all_gone, "every process gone")
    status = read_status(run.path)
    assert status.reason == (
        "rank 1 ended after step 6 while the others went on: its data is shorter, or its loop takes fewer steps; "
        "another attempt would end the same way"
    )
    assert (status.failed_rank, status.restarts) == (1, 0)
    assert "ZeroDivisionError" in (run.path / "logs/1/rank-1.log").read_text()  # the third child's, who told nobody
    events = [message for message in read_messages(run.path) if isinstance(message, Event)]
    unsound = [(event.rank, event.step, event.text) for event in events if event.what == "not finite"]
    assert [(rank, step) for rank, step, _ in unsound] == [(1, 5)]
    assert "only the loss of rank 1 is not finite" in unsound[0][2]
