"""SIGUSR1 and SIGTERM in a rank: the supervisor hears of them, unless the SIGTERM is its own or the launcher's. Every
process here is one of its own, since it is about handlers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.rundir import SUPERVISOR_VARIABLE
from tests.harness.waiting import patient, until

SUPERVISOR = """
import os, signal, sys
wanted = {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
print("ready", flush=True)
for line in sys.stdin:
    if line.strip():
        os.kill(int(line), signal.SIGTERM)
    else:
        print(signal.Signals(signal.sigwait(wanted)).name, flush=True)
"""
RANK = r"""
import os, signal, subprocess, sys
from runtime.telemetry import die_with_parent, stopsignal
from runtime.wire.rundir import BLOCKED_SIGNALS

if "early" in sys.argv:
    number = signal.Signals[sys.argv[-1]]
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # as the supervisor does
    subprocess.run([sys.executable, "-c", f"import os; os.kill({os.getpid()}, {int(number)})"], check=True)
if "own" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda number, frame: print("its own", flush=True))
stopsignal.listen()
if "watched" in sys.argv:
    stopsignal.supervisor_is_watched()
if "helper" in sys.argv and os.fork() == 0:
    if "worker" in sys.argv:  # as torch does in a DataLoader's
        from runtime.native.loading import term
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert term().zt_in_data_worker() == 0
    die_with_parent(signal.SIGKILL)
    os.write(1, f"{os.getpid()}\n".encode())
    while True:
        signal.pause()
os.write(1, f"{os.getpid()}\n".encode())
for line in sys.stdin:
    pid = int(line)
    os.kill(pid, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[str]]:
    """Ends the process whose number it reads; at an empty line, waits for a signal and tells its name."""
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert line(process) == "ready"
        yield process
        process.kill()


@pytest.fixture
def rank(request: pytest.FixtureRequest, supervisor: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that listens, started by this one as ranks are by torchrun. Ends the helper whose number it reads, and
    tells its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", RANK, *getattr(request, "param", "").split()],
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


def type_into(process: subprocess.Popen[str], text: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{text}\n")
    process.stdin.flush()


def heard(supervisor: subprocess.Popen[str]) -> str:
    type_into(supervisor)
    return line(supervisor)


def somebody_sends(number: signal.Signals, pid: int) -> None:
    """From a process that is none of its relatives."""
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"], check=True)


def pending(pid: int) -> int:
    """The set of signals that the process has not taken yet, as a bit mask."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("ShdPnd:")).split()[1], 16)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_somebodys_signal_is_handed_on(
    rank: subprocess.Popen[str], supervisor: subprocess.Popen[str], number: signal.Signals
) -> None:
    pid = int(line(rank))
    for _ in range(2):  # it lives on
        somebody_sends(number, pid)
        assert heard(supervisor) == number.name


@pytest.mark.parametrize("rank", ["early SIGTERM", "early SIGUSR1"], indirect=True)
def test_one_that_came_while_it_was_blocked_is_found(
    rank: subprocess.Popen[str], supervisor: subprocess.Popen[str], request: pytest.FixtureRequest
) -> None:
    line(rank)
    assert heard(supervisor) in request.node.callspec.id


def test_the_launchers_sigterm_ends_it(rank: subprocess.Popen[str]) -> None:
    os.kill(int(line(rank)), signal.SIGTERM)
    assert rank.wait(patient(20)) == -signal.SIGTERM


def test_the_supervisors_sigterm_ends_it(rank: subprocess.Popen[str], supervisor: subprocess.Popen[str]) -> None:
    type_into(supervisor, line(rank))
    assert rank.wait(patient(20)) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("rank", "code"), [("helper", -signal.SIGTERM), ("helper worker", 0)], indirect=["rank"], ids=["any", "worker"]
)
def test_a_forked_helper_is_its_ranks_to_end(rank: subprocess.Popen[str], code: int) -> None:
    helper = next(pid for pid in (int(line(rank)), int(line(rank))) if pid != rank.pid)
    somebody_sends(signal.SIGTERM, helper)
    somebody_sends(signal.SIGTERM, helper)
    # While one is pending, the kernel drops another one of the same number, whoever sends it.
    until(lambda: not pending(helper), "both signals taken")
    type_into(rank, str(helper))  # it lives: only now it ends
    assert line(rank) == str(int(code))


@pytest.mark.parametrize("rank", ["own"], indirect=True)
def test_a_handler_of_the_scripts_own_stays(rank: subprocess.Popen[str]) -> None:
    somebody_sends(signal.SIGUSR1, int(line(rank)))
    assert line(rank) == "its own"


@pytest.mark.parametrize("rank", ["", "watched"], indirect=True)
def test_without_a_supervisor_sigterm_ends_a_rank_that_nothing_else_would(
    rank: subprocess.Popen[str], supervisor: subprocess.Popen[str], request: pytest.FixtureRequest
) -> None:
    """Before initialize(); afterwards the rank saves and ends by itself."""
    pid = int(line(rank))
    supervisor.kill()
    os.waitid(os.P_PID, supervisor.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    somebody_sends(signal.SIGTERM, pid)
    if "watched" in request.node.callspec.id:
        somebody_sends(signal.SIGTERM, pid)  # it is still there
    else:
        assert rank.wait(patient(20)) == -signal.SIGTERM
