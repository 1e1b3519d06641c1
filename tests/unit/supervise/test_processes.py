"""Which processes the end of an attempt spares."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.harness.waiting import patient, until
from zerotop.supervise.processes import descendants

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """(process id of a child of ours, of its child)."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    yield parent.pid, child
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait(patient(10))
    parent.stdout.close()


def test_what_is_spared_is_spared_with_all_below_it(family: tuple[int, int]) -> None:
    parent, child = family
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert {parent, child, other.pid} <= {process.pid for process in descendants()}
        left = {process.pid for process in descendants(spare=[parent])}
        assert other.pid in left and not left & {parent, child}
        assert {parent, child} <= {process.pid for process in descendants(spare=[other.pid, 2**22])}
    finally:
        other.kill()
        other.wait()
    until(lambda: other.pid not in {process.pid for process in descendants()}, "its end")
