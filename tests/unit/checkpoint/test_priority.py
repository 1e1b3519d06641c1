"""A writer process has idle priority while training computes, and normal priority while training waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from runtime.checkpoint.saving.priority import STARTING_NICE, Priority
from tests.harness.waiting import until

THREADS = """
import sys, threading
for _ in range(3):
    threading.Thread(target=sys.stdin.read).start()
"""

root_alone = pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of four threads."""
    child = subprocess.Popen([sys.executable, "-c", THREADS], stdin=subprocess.PIPE)
    until(lambda: len(os.listdir(f"/proc/{child.pid}/task")) == 4, "four threads")
    yield child
    child.communicate()


def _seen(pid: int) -> set[tuple[int, int, int]]:
    """(CPU policy, niceness, disk priority) of all threads."""
    return {
        (
            os.sched_getscheduler(int(thread)),
            os.getpriority(os.PRIO_PROCESS, int(thread)),
            int(psutil.Process(int(thread)).ionice().ioclass),
        )
        for thread in os.listdir(f"/proc/{pid}/task")
    }


IDLE = {(os.SCHED_IDLE, STARTING_NICE, int(psutil.IOPRIO_CLASS_IDLE))}
STARTING = {(os.SCHED_OTHER, STARTING_NICE, int(psutil.IOPRIO_CLASS_NONE))}
NORMAL = {(os.SCHED_OTHER, 0, int(psutil.IOPRIO_CLASS_NONE))}


def test_all_threads_become_idle(process: subprocess.Popen[bytes]) -> None:
    priority = Priority(process.pid)
    assert _seen(process.pid) == STARTING
    priority.lower()
    assert _seen(process.pid) == IDLE


@root_alone
def test_a_wait_raises_all_threads_until_the_last_wait_ends(process: subprocess.Popen[bytes]) -> None:
    priority = Priority(process.pid)
    priority.lower()
    with priority.raised():
        with priority.raised():
            assert _seen(process.pid) == NORMAL
        assert _seen(process.pid) == NORMAL
    assert _seen(process.pid) == IDLE


@root_alone
def test_a_process_that_gets_ready_during_a_wait_is_not_lowered(process: subprocess.Popen[bytes]) -> None:
    priority = Priority(process.pid)
    with priority.raised():
        lowering = threading.Thread(target=priority.lower)
        lowering.start()
        lowering.join()
        assert _seen(process.pid) == NORMAL
    assert _seen(process.pid) == IDLE


def test_a_process_that_is_gone_is_no_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    Priority(child.pid).lower()
