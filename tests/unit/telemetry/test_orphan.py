"""A rank whose supervisor is gone, and a process whose parent is gone."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.telemetry import Telemetry, TelemetryError
from runtime.telemetry.orphan import GRACE_VARIABLE, SupervisorWatch, grace_s
from runtime.wire.rundir import Sockets
from tests.harness import ROOT
from tests.harness.fakehub import hello
from tests.harness.waiting import patient, until

DEADLINE_S = patient(10)


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def no_pidfd(pid: int, flags: int = 0) -> int:
    raise OSError(errno.ENOSYS, "no such system call")


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_paused_rank_wakes_when_its_supervisor_dies(
    pidfd: bool,
    supervisor: subprocess.Popen[bytes],
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(short_folder), supervisor_pid=supervisor.pid)
    telemetry.start(hello())
    assert telemetry._watch is not None
    try:
        assert not telemetry.inbox.orphaned
        killer = threading.Timer(0.1, supervisor.kill)
        killer.start()
        start = time.monotonic()
        assert telemetry.inbox.next(60) is None
        killer.join()
        assert time.monotonic() - start < DEADLINE_S
        assert telemetry.inbox.orphaned
        why = f"the supervisor (pid {supervisor.pid}) is gone"
        until(lambda: why in caplog.text, "the reason in the rank's log")
        start = time.monotonic()
        telemetry.close()
        assert time.monotonic() - start < patient(1), "with the supervisor went the hub: there is nobody to flush to"
    finally:
        telemetry.close()
        telemetry._watch.stop()  # or the grace timer would end this process
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("zerotop")]


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_supervisor_that_is_gone_already_counts_as_gone(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    process = subprocess.Popen(["true"])
    process.wait()
    gone = threading.Event()
    watch = SupervisorWatch(process.pid, gone.set, grace_s=60)
    watch.start()
    try:
        assert gone.wait(DEADLINE_S)
    finally:
        watch.stop()


def test_stopping_the_watch_ends_its_thread_and_tells_nobody(supervisor: subprocess.Popen[bytes]) -> None:
    gone = threading.Event()
    files = len(os.listdir("/proc/self/fd"))
    watch = SupervisorWatch(supervisor.pid, gone.set, grace_s=60)
    watch.start()
    watch.stop()
    watch.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("zerotop")]
    assert len(os.listdir("/proc/self/fd")) == files
    assert not gone.is_set()


RANK = """
import os, sys, threading
from pathlib import Path
from runtime.telemetry import Telemetry
from runtime.wire.rundir import Sockets
from tests.harness.fakehub import hello
telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(Path(sys.argv[1])), supervisor_pid=int(sys.argv[2]))
telemetry.start(hello())
print("up", flush=True)
while telemetry.inbox.next(60) is not None or not telemetry.inbox.orphaned:
    pass
if sys.argv[3] == "closes":
    telemetry.close()
threading.Event().wait()  # stuck, as in a collective that never ends
"""


@pytest.mark.parametrize("then", ["hangs", "closes"])
def test_an_orphan_that_does_not_leave_ends_itself_after_the_grace(
    then: str, supervisor: subprocess.Popen[bytes], short_folder: Path
) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(short_folder), str(supervisor.pid), then],
        env={**os.environ, GRACE_VARIABLE: "0.3"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert rank.stdout is not None and rank.stdout.readline() == b"up\n"
        supervisor.kill()
        _, errors = rank.communicate(timeout=DEADLINE_S)
    finally:
        rank.kill()
        rank.wait()
    assert rank.returncode == 1
    assert f"supervisor (pid {supervisor.pid}) is gone and this rank did not stop within 0.3 s" in errors.decode()


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_grace_that_is_no_time_is_refused(text: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, text)
    with pytest.raises(TelemetryError, match=f"{GRACE_VARIABLE}: expected a number of seconds from 0, got '{text}'"):
        Telemetry(rank=0, attempt=1, sockets=Sockets(short_folder)).start(hello())


def test_the_grace_is_a_minute_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    assert grace_s() == 60
    monkeypatch.setenv(GRACE_VARIABLE, "2.5")
    assert grace_s() == 2.5


PARENT = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip(), flush=True)
threading.Event().wait()
"""
CHILD = """
import os, signal, threading
from runtime.telemetry import die_with_parent
print(os.getpid(), die_with_parent(signal.SIGKILL), flush=True)
threading.Event().wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_process_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid, armed = parent.stdout.readline().split()
        descriptor = os.pidfd_open(int(pid))
        try:
            assert armed == b"True"
            parent.kill()
            assert select.select([descriptor], [], [], DEADLINE_S)[0], "the child lives on"
        finally:
            if not select.select([descriptor], [], [], 0)[0]:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
