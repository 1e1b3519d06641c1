"""One run, one writer: two launches at once, and a launch into a run whose ranks still save."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from runtime.wire.rundir import read_run, read_status
from tests.harness.runs import StartedRun, lives
from tests.harness.waiting import until
from zerotop.rundir import lock as module
from zerotop.rundir.directory import read_entry
from zerotop.rundir.lock import holders, take
from zerotop.rundir.paths import RunError

Start = Callable[..., StartedRun]
AGAIN = {"name": "q1", "resume": True}
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def finished(start: Start) -> StartedRun:
    run = start({"name": "q1"}, FAKE_STEPS=3)
    run.see_state("finished")
    until(run.all_gone, "every process gone")
    return run


def test_the_supervisor_and_its_launcher_hold_the_lock_while_the_run_lives(start: Start) -> None:
    run = start({"name": "q1"})
    run.see_step(1)
    launcher = psutil.Process(run.pid_of_rank(0)).ppid()
    assert {process.pid for process in holders(run.path)} == {read_run(run.path).supervisor_pid, launcher}
    assert take(run.path) is None
    assert run.command("stop").ack.state == "applied"
    until(run.all_gone, "every process gone")
    assert holders(run.path) == []


def test_of_two_launches_at_once_one_is_refused(start: Start) -> None:
    finished(start)
    begun = threading.Barrier(2)
    runs: list[StartedRun] = []
    refusals: list[str] = []

    def resume() -> None:
        begun.wait()
        try:
            runs.append(start(AGAIN))
        except RunError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=resume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1 and len(refusals) == 1
    assert "there is nothing to resume" in refusals[0]
    assert read_run(runs[0].path).attempt == 2
    runs[0].see_step(2)


def test_a_resume_waits_for_ranks_that_still_save(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    first = start({"name": "q1"}, FAKE_HANG="0:3", ZEROTOP_ORPHAN_GRACE_S="2")
    first.pid_of_rank(1)
    psutil.Process(read_run(first.path).supervisor_pid).kill()
    until(lambda: not read_entry(first.path).live, "the end of the supervisor")
    left = first.processes()
    assert len(left) >= 2
    second = start(AGAIN, FAKE_STEPS=5)
    assert not any(lives(process) for process in left)
    second.see_state("finished")
    told = [line for line in capsys.readouterr().err.splitlines() if "are still saving" in line]
    assert len(told) == 1 and told[0].startswith("q1: ")


def test_what_holds_the_lock_for_too_long_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(start)
    monkeypatch.setattr(module, "MARGIN_S", 0.3)
    command = [sys.executable, "-c", HOLD, str(run.path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(
            RunError, match=rf"q1 can't be resumed yet: .*lock is held by process {holder.pid} \(.*python"
        ):
            start(AGAIN, ZEROTOP_ORPHAN_GRACE_S="0")
        holder.stdin.close()  # type: ignore[union-attr]
    assert read_status(run.path).state == "finished" and read_run(run.path).attempt == 1
    start(AGAIN, FAKE_STEPS=6).see_state("finished")
