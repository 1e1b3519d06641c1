"""Recordings of long runs, written in seconds: the messages of a scripted run at moments that jump."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from runtime.wire.base import Message
from runtime.wire.codec import encode
from runtime.wire.node import NodeStats
from tests.tui.scripted_run import ScriptedRun
from zerotop.hub import blocks, recorder
from zerotop.hub.thinning import thin_steps

BEGIN_S = 1_790_000_040.0
"""Wall time at which the runs begin: a whole minute."""


def two_minutes(folder: Path) -> Path:
    """A recording of two ranks in `folder`, with a verdict in it; returns the folder."""
    run = SpokenRun(ranks=2)
    for number in range(120):
        run.second()
        if number == 70:
            run.event("verdict", "rank 1 is slow in data loading", "warning")
    return write(folder, run)


class SpokenRun(ScriptedRun):
    """A scripted run that keeps what it says, with the time and the sender."""

    def __init__(self, ranks: int = 2, **more: object) -> None:
        self.said: list[tuple[float, str, Message]] = []
        super().__init__(ranks, **more)  # type: ignore[arg-type]
        shift = BEGIN_S - self.wall_s
        self.wall_s += shift
        self.said = [(wall + shift, source, message) for wall, source, message in self.said]

    def say(self, *messages: Message) -> None:
        for message in messages:
            number = getattr(message, "rank", None)
            source = f"rank/{number}" if number is not None else "supervisor"
            source = "probe/node-a" if isinstance(message, NodeStats) else source
            self.said.append((self.wall_s, source, message))
        super().say(*messages)

    def take(self) -> list[tuple[float, str, Message]]:
        """What was said since the last call."""
        said, self.said = self.said, []
        return said

    def jump(self, seconds: float) -> None:
        """Time goes by in which nothing is recorded."""
        self.wall_s += seconds
        self.now_ns += int(seconds * 1e9)

    def second(self) -> None:
        """One step of one second, as the recording samples it."""
        self.steps(1, 1000.0)
        self.node()


def create(path: Path) -> sqlite3.Connection:
    """An empty recording."""
    database = sqlite3.connect(path)
    recorder.create(database)
    database.commit()
    return database


def insert(database: sqlite3.Connection, said: Iterable[tuple[float, str, Message]], attempt: int = 1) -> None:
    """Write rows as the recorder does."""
    rows = [
        (attempt, wall, source, message.kind, encode(message))  # type: ignore[attr-defined]
        for wall, source, message in said
    ]
    with database:
        database.executemany(recorder.INSERT, rows)


def write(folder: Path, run: SpokenRun, attempt: int = 1) -> Path:
    """RUN/recording.sqlite of what `run` has said; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(create(folder / "recording.sqlite")) as database:
        insert(database, run.take(), attempt)
    return folder


def pack(database: sqlite3.Connection, now_wall_s: float) -> None:
    """Everything that the recorder would have packed and thinned by then."""
    packer = blocks.Packer()
    while packer.work(database, now_wall_s):
        pass
    thin_steps(database)


def moments(days: float) -> Iterator[float]:
    """Seconds between the samples that are left of a run of so many days when it ends: of the first days one a minute,
    of the last day one in ten seconds, of the last hour one a second. To be fed to SpokenRun.jump."""
    left_s = days * 86_400
    while left_s > 0:
        spacing = 60 if left_s > 86_400 else 10 if left_s > 3600 else 1
        yield float(spacing - 1)  # the step itself takes a second
        left_s -= spacing
