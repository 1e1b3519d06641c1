"""A started run under the real supervisor, its processes, and screens on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from runtime.wire.filelock import try_lock
from runtime.wire.messages import Command, CommandRecord, RunStatus
from runtime.wire.rundir import read_status
from tests.harness.waiting import DEADLINE_S, until
from zerotop.rundir.directory import RunEntry, read_entry
from zerotop.rundir.paths import LOCK_NAME, remove_sockets
from zerotop.source.live import LiveSource


class StartedRun:
    """A started run, and a screen's source on it."""

    def __init__(self, entry: RunEntry, pids_file: Path) -> None:
        self.path = entry.path
        self.entry = entry
        self._pids_file = pids_file
        self._sources: list[LiveSource] = []
        self.source = self.screen()
        # By number and start time, taken while it lives: a later process with the same number is none of ours.
        self._seen: dict[int, psutil.Process] = {}
        self.processes()

    def screen(self) -> LiveSource:
        source = LiveSource(self.entry.sockets, self.path, lambda: read_entry(self.path).status)
        source.start()
        self._sources.append(source)
        return source

    def see(
        self,
        condition: Callable[[LiveSource], object],
        what: str,
        source: LiveSource | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """Wait until the screen's state fulfils `condition`."""
        screen = source or self.source

        def look() -> bool:
            self.processes()
            screen.poll()
            return bool(condition(screen))

        until(look, lambda: f"{what}; the state is {screen.state.status}", deadline_s, pause=screen.wait)

    def see_state(self, name: str, deadline_s: float = DEADLINE_S) -> None:
        self.see(lambda source: source.state.state_name == name, f"state {name}", deadline_s=deadline_s)

    def see_step(self, step: int, attempt: int = 0, deadline_s: float = DEADLINE_S) -> None:
        """Both ranks (of `attempt`, if it is given) have finished `step`, and the run goes on."""

        def there(source: LiveSource) -> bool:
            state = source.state
            assert state.state_name != "failed", state.status
            ranks = [
                rank for rank in state.ranks.values() if not attempt or (rank.hello and rank.hello.attempt == attempt)
            ]
            return len(ranks) == 2 and all(rank.step is not None and rank.step.step >= step for rank in ranks)

        self.see(there, f"step {step} on both ranks", deadline_s=deadline_s)

    def see_end(self, name: str, deadline_s: float = DEADLINE_S) -> RunStatus:
        """Wait until state.json says `name` and every process is gone; return what it says then."""
        until(
            lambda: read_status(self.path).state == name,
            lambda: f"state {name}, not {read_status(self.path)}",
            deadline_s,
        )
        until(self.all_gone, "every process gone", deadline_s)
        return read_status(self.path)

    def command(self, name: str, identity: str | None = None, **arguments: object) -> CommandRecord:
        """Send a command and wait for its final answer."""
        sent = Command.model_validate(
            {"id": identity or f"{name}-{time.monotonic_ns()}", "name": name, "arguments": arguments, "who": "tester"}
        )
        self.source.send(sent)
        self.see(lambda source: _final(source.state.commands.get(sent.id)), f"an answer to {name}")
        return self.source.state.commands[sent.id]

    def pid_of_rank(self, rank: int) -> int:
        self.see(lambda source: source.state.rank(rank).hello is not None, f"rank {rank}'s hello")
        hello = self.source.state.ranks[rank].hello
        assert hello is not None
        return hello.pid

    def processes(self) -> list[psutil.Process]:
        """Every living process of the run: the supervisor, the launcher, the ranks, their children."""
        numbers = [read_entry(self.path).run.supervisor_pid]
        if self._pids_file.exists():
            numbers += [int(line) for line in self._pids_file.read_text().split()]
        for number in numbers:
            if number not in self._seen:
                try:
                    self._seen[number] = psutil.Process(number)
                except psutil.NoSuchProcess:
                    continue
        return [process for process in self._seen.values() if lives(process)]

    def all_gone(self) -> bool:
        """Whether every process has ended, torchrun among them: it holds the lock of the sockets folder, in which its
        rendezvous file is. If that was removed before, torchrun would wait for it for ten minutes."""
        return not self.processes() and not self._sockets_in_use()

    def _sockets_in_use(self) -> bool:
        try:
            descriptor = os.open(self.entry.sockets.folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not try_lock(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        for source in self._sources:
            source.close()
        if read_entry(self.path).live:
            for process in self.processes():
                process.kill()
        until(self.all_gone, "the end of every process")


def end_runs(runs: Iterable[StartedRun]) -> None:
    """Abort those that live, wait until their processes are gone, and remove what a killed supervisor left."""
    for run in runs:
        if read_entry(run.path).live:
            run.command("abort")
        run.close()
        remove_sockets(run.entry.sockets.folder)


def _final(record: CommandRecord | None) -> bool:
    return record is not None and record.ack.state in ("applied", "rejected")


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
