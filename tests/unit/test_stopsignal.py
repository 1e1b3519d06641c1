"""SIGTERM in a rank: from its launcher or supervisor it ends, from anybody else it is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from runtime.wire.rundir import SUPERVISOR_VARIABLE

RANK = """
import os, sys
from runtime.telemetry import Inbox, stopsignal

stopsignal.listen()
inbox = Inbox()
stopsignal.deliver_to(inbox)
if "fork" in sys.argv and os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    print("a helper lives on", flush=True)
    os._exit(0)
print(os.getpid(), flush=True)
with inbox._condition:
    inbox._condition.wait_for(lambda: inbox.stop_requested)
print("asked to stop:", inbox.stop_reason, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[str]]:
    """Sends a SIGTERM to the process whose number it is given."""
    code = "import os, signal; os.kill(int(input()), signal.SIGTERM)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture
def rank(request: pytest.FixtureRequest, supervisor: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that listens, started by this one as ranks are by torchrun."""
    with subprocess.Popen(
        [sys.executable, "-c", RANK, *getattr(request, "param", [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, SUPERVISOR_VARIABLE: str(supervisor.pid)},
    ) as process:
        yield process
        process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def type_enter(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def somebody_sends(number: signal.Signals, pid: int) -> None:
    """From a process that is none of its relatives."""
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_somebodys_signal_asks_for_a_stop(rank: subprocess.Popen[str], number: signal.Signals) -> None:
    somebody_sends(number, int(line(rank)))
    assert line(rank) == f"asked to stop: {number.name}"
    somebody_sends(number, rank.pid)  # again: it still lives
    type_enter(rank)
    assert rank.wait(20) == 0


def test_the_launchers_sigterm_ends_it(rank: subprocess.Popen[str]) -> None:
    os.kill(int(line(rank)), signal.SIGTERM)
    assert rank.wait(20) == -signal.SIGTERM


def test_the_supervisors_sigterm_ends_it(rank: subprocess.Popen[str], supervisor: subprocess.Popen[str]) -> None:
    supervisor.communicate(line(rank) + "\n")
    assert rank.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize("rank", [["fork"]], indirect=True)
def test_a_forked_helper_is_its_parents_to_end(rank: subprocess.Popen[str]) -> None:
    helper = next(pid for pid in (int(line(rank)), int(line(rank))) if pid != rank.pid)
    somebody_sends(signal.SIGTERM, helper)
    type_enter(rank)
    assert line(rank) == "a helper lives on"
    somebody_sends(signal.SIGTERM, rank.pid)
    assert line(rank) == "asked to stop: SIGTERM"
