"""What the kernel says of a rank's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.harness.waiting import until
from zerotop.probe import processes
from zerotop.probe.processes import GONE, BusyProcesses, RunDelay, process_state

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_process_that_is_stopped_and_one_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: process_state(child.pid) == psutil.STATUS_STOPPED)
    finally:
        child.kill()
        child.wait()
    assert process_state(child.pid) == GONE


def test_run_delay_is_the_share_since_the_last_sample(tmp_path: Path) -> None:
    def told(pid: int, delay_ns: int) -> None:
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        (tmp_path / str(pid) / "schedstat").write_text(f"123456 {delay_ns} 99\n")

    delay = RunDelay(tmp_path)
    told(10, 5_000_000_000)
    assert delay.sample({0: 10, 1: 11}, 100.0) == {}
    told(10, 5_600_000_000)
    assert delay.sample({0: 10, 1: 11}, 102.0) == {0: 30.0}
    told(12, 0)
    assert delay.sample({0: 12}, 103.0) == {}  # another process
    told(12, 9_000_000_000)
    assert delay.sample({0: 12}, 104.0) == {0: 100.0}


@linux
def test_the_busiest_processes_are_found_and_the_runs_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BUSY_PERCENT", 1.0)  # a loaded machine leaves a hog little
    monkeypatch.setattr(processes, "BUSY_KEPT", 1000)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    own, other = hogs
    try:
        busy = BusyProcesses()

        def found() -> set[int]:
            return {one.pid for one in busy.sample({own.pid})}

        until(lambda: other.pid in found())
        assert own.pid not in found()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
