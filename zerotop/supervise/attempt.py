"""The processes of one attempt: torchrun (or the command that run.json names in its place), or a command of the user's,
and the ranks it starts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from runtime.wire.rundir import BLOCKED_SIGNALS, LAUNCHER_LOG, RunFile
from zerotop.diagnose.evidence import EvidenceCollector
from zerotop.diagnose.outcome import reported_exit_codes
from zerotop.launch import torchrun, wrapped
from zerotop.rundir.paths import RunError

REPORT_PATIENCE_S = 5.0
"""How long torchrun may take from reaping a failed rank to naming it in its log."""
REPORT_INTERVAL_S = 0.1


class Attempt:
    """Started once; signals when its launcher has ended and when a rank has died.

    After the death of a rank torchrun waits up to 30 s for the others and reports nothing meanwhile. So each rank is
    watched here too, from its hello on: its pidfd becomes readable at once, and until torchrun reaps the process the
    kernel tells its exit code. If torchrun was quicker, its log names the exit code a moment later. Without pidfds (not
    Linux) only the end of torchrun tells.
    """

    def __init__(self, run: RunFile, path: Path) -> None:
        self.run = run
        self.path = path
        self.logs = path / "logs" / str(run.attempt)
        self.collector = EvidenceCollector(run, path)
        self.ended = asyncio.Event()
        """Set when the launcher has ended."""
        self.rank_died = asyncio.Event()
        """Set when a rank has ended by a signal or with an exit code other than 0."""
        self.end_asked = asyncio.Event()
        """Set by an abort, or together with `failure`."""
        self.failure: str | None = None
        """Why the supervisor ends the ranks as failed."""
        self.exit_code: int | None = None
        """The exit code of the launcher."""
        self.killed = False
        """A signal that was not ours ended the launcher."""
        self.rank_codes: dict[int, int] = {}
        """Rank -> exit code that we read ourselves, of ranks that we did not end."""
        self.ended_by_us: set[int] = set()
        """Ranks that were alive when we began to end the attempt, whatever torchrun says about them."""
        self._launcher: subprocess.Popen[bytes] | None = None
        self._ranks: dict[int, int] = {}  # pid -> rank
        self._codes: dict[int, int] = {}  # pid -> exit code of children and adopted orphans
        self._pidfds: dict[int, int] = {}  # pid -> descriptor
        self._reports: dict[int, asyncio.TimerHandle] = {}  # rank -> the next look into torchrun's log

    def start(self, *, resume: bool, keep: tuple[int, ...]) -> None:
        """Start the launcher. Raises RunError if that fails.

        The launcher inherits the descriptors `keep`: locks on the run and on the sockets folder, where its rendezvous
        file is. If this supervisor is killed, both stay locked until torchrun has ended.
        """
        if self.run.wrapped:
            command = wrapped.command(self.run)
            variables = wrapped.environment(self.run, self.path, supervisor_pid=os.getpid())
        else:
            command = self.run.command or torchrun.command(self.run, self.path)
            variables = torchrun.environment(self.run, self.path, supervisor_pid=os.getpid(), resume=resume)
            # Blocked, and so inherited: see runtime/telemetry/stopsignal.py.
            signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
        try:
            with (self.logs / LAUNCHER_LOG).open("ab") as log:
                self._launcher = subprocess.Popen(
                    command,
                    env=variables,
                    cwd=self.run.working_folder or None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=keep,
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(f"can't start the ranks: {command[0]}: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        self.collect({})  # it may have ended before we knew its number

    def collect(self, ended: Mapping[int, int]) -> None:
        """Take the exit codes of children and adopted orphans, by process id. Ranks are among them if torchrun died
        first."""
        self._codes |= ended
        if self._launcher is not None and self._launcher.pid in self._codes and not self.ended.is_set():
            self.exit_code = self._launcher.returncode = self._codes[self._launcher.pid]
            self.ended.set()

    def terminate_launcher(self) -> None:
        """Send SIGTERM to the launcher alone, which ends what it has started as it sees fit."""
        if self._launcher is not None and not self.ended.is_set():
            self._launcher.terminate()

    def has_only_launcher(self, left: list[psutil.Process]) -> bool:
        """Whether only the launcher is left. It ignores SIGTERM and ends when its ranks have."""
        return self._launcher is not None and [process.pid for process in left] == [self._launcher.pid]

    def watch(self, rank: int, pid: int) -> None:
        """Watch for the end of this rank's process."""
        if pid in self._ranks:
            return
        self._ranks[pid] = rank
        try:
            descriptor = self._pidfds[pid] = os.pidfd_open(pid)
        except (OSError, AttributeError):
            return  # gone already, or no such thing here: torchrun tells
        asyncio.get_running_loop().add_reader(descriptor, self._has_ended, rank, pid)

    def _has_ended(self, rank: int, pid: int) -> None:
        self._forget(pid)
        code = _exit_code_of_zombie(pid)
        if code is None:
            deadline = asyncio.get_running_loop().time() + REPORT_PATIENCE_S
            self._read_report(rank, deadline)
        else:
            self._note_end(rank, code)

    def _note_end(self, rank: int, code: int) -> None:
        self.rank_codes.setdefault(rank, code)
        if code:
            self.rank_died.set()

    def _read_report(self, rank: int, deadline: float) -> None:
        """Look for the exit code of a rank that torchrun has reaped in torchrun's log, until the deadline (in the
        event loop's time): it logs failures only."""
        loop = asyncio.get_running_loop()
        if (code := reported_exit_codes(self.logs).get(rank)) is not None:
            self._note_end(rank, code)
        elif not self.ended.is_set() and loop.time() < deadline:
            self._reports[rank] = loop.call_later(REPORT_INTERVAL_S, self._read_report, rank, deadline)

    def _forget(self, pid: int) -> None:
        descriptor = self._pidfds.pop(pid)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    def look_away(self) -> None:
        """Stop watching: from here on we end the processes ourselves, and their exit codes say nothing about the
        cause."""
        self.killed = self.exit_code is not None and self.exit_code < 0
        for timer in self._reports.values():
            timer.cancel()
        for pid in list(self._pidfds):
            rank, code = self._ranks[pid], _exit_code_of_zombie(pid)
            if code is not None:  # a moment ago
                self.rank_codes.setdefault(rank, code)
            elif psutil.pid_exists(pid):
                self.ended_by_us.add(rank)
            self._forget(pid)
        for pid, code in self._codes.items():
            if pid in self._ranks:
                self.rank_codes.setdefault(self._ranks[pid], code)


def _exit_code_of_zombie(pid: int) -> int | None:
    """The exit code of a process that has ended and was not reaped yet; None if the kernel does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
        return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == b"Z" else None
    except (OSError, IndexError, ValueError):
        return None
