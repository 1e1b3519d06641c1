"""The death of a rank is noticed at once, whoever reaps the process first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import read_run
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient
from zerotop.supervise.attempt import Attempt


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    path = write_run(tmp_path, "quiet-lake", tmp_path, RunStatus(name="quiet-lake", state="running"))
    attempt = Attempt(read_run(path), path)
    attempt.logs.mkdir(parents=True)
    return attempt


async def _death_seen(attempt: Attempt, report: str) -> None:
    """Rank 1 is killed and reaped, as torchrun does it, before the event loop can look; then `report` is logged."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    try:
        attempt.watch(1, process.pid)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    await asyncio.sleep(0)
    (attempt.logs / "launcher.log").write_text(report)
    try:
        await asyncio.wait_for(attempt.rank_died.wait(), patient(10))
    finally:
        attempt.look_away()


def test_a_rank_that_its_launcher_reaped_first_has_died(attempt: Attempt) -> None:
    asyncio.run(_death_seen(attempt, "failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python\n"))
    assert attempt.rank_codes == {1: -9}


def test_a_rank_that_left_in_peace_has_not(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerotop.supervise.attempt.REPORT_PATIENCE_S", 0.3)
    monkeypatch.setattr(f"{__name__}.patient", lambda _: 1.0)
    with pytest.raises(TimeoutError):
        asyncio.run(_death_seen(attempt, "all well\n"))
    assert attempt.rank_codes == {} and not attempt.rank_died.is_set()
