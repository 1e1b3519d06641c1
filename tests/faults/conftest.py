"""Runs of fake ranks under the real supervisor, in a state home of their own; every process of them is gone
afterwards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import Command, CommandRecord
from zerotop.launch.start import start_run
from zerotop.rundir.directory import RunEntry, read_entry
from zerotop.rundir.paths import remove_sockets
from zerotop.source.live import LiveSource

DEADLINE_S = 20.0
FAKE_RANK = Path(__file__).resolve().parents[1] / "fake_rank.py"


def until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition()`, or fail saying `what` was awaited."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.02)


class FakeRun:
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

    def see(self, condition: Callable[[LiveSource], bool], what: str, source: LiveSource | None = None) -> None:
        """Wait until the screen's state fulfils `condition`."""
        screen = source or self.source

        def look() -> bool:
            self.processes()
            screen.poll()
            return condition(screen)

        until(look, f"{what}; the state is {screen.state.status}")

    def see_state(self, name: str) -> None:
        self.see(lambda source: source.state.state_name == name, f"state {name}")

    def see_step(self, step: int) -> None:
        def there(source: LiveSource) -> bool:
            done = [rank.step.step for rank in source.state.ranks.values() if rank.step]
            return len(done) == 2 and min(done) >= step

        self.see(there, f"step {step} on both ranks")

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
        return not self.processes()

    def close(self) -> None:
        for source in self._sources:
            source.close()
        if read_entry(self.path).live:
            for process in self.processes():
                process.kill()
        until(self.all_gone, "the end of every process")


def _final(record: CommandRecord | None) -> bool:
    return record is not None and record.ack.state in ("applied", "rejected")


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeRun]]:
    """`start(FAKE_STEPS=50, ...)`: a two-rank fake run with this environment; `launch` are start_run's own
    arguments."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1}))
    runs: list[FakeRun] = []

    def begin(launch: dict[str, object] | None = None, **environment: object) -> FakeRun:
        pids_file = tmp_path / f"pids-{len(runs)}"
        monkeypatch.setenv("FAKE_PIDS", str(pids_file))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        arguments: dict[str, object] = {
            "nproc": 2,
            "device": "cpu",
            "command": [sys.executable, str(FAKE_RANK), "--ranks", "2"],
        }
        entry = start_run(**{"config_path": config, **arguments, **(launch or {})})  # type: ignore[arg-type]
        for name in environment:
            monkeypatch.delenv(name)
        runs.append(FakeRun(entry, pids_file))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()
        if _was_killed(run):
            remove_sockets(run.entry.sockets.folder)
        assert not run.entry.sockets.folder.exists()


def _was_killed(run: FakeRun) -> bool:
    """A killed supervisor can't clear up; the next launch does."""
    return "supervisor died" in read_entry(run.path).status.reason


@pytest.fixture
def launch_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeRun]]:
    """`launch_real(config, name=..., ...)`: a run of two real ranks on the CPU; text.txt is theirs to learn."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    path = tmp_path / "config.json"
    runs: list[FakeRun] = []

    def begin(config: dict[str, object], **arguments: object) -> FakeRun:
        path.write_text(json.dumps(config))
        entry = start_run(**{"config_path": path, "nproc": 2, "device": "cpu", **arguments})  # type: ignore[arg-type]
        runs.append(FakeRun(entry, tmp_path / "no-pids"))
        return runs[-1]

    yield begin
    for run in runs:
        if read_entry(run.path).live:
            run.command("abort")
        run.close()
        remove_sockets(run.entry.sockets.folder)
