"""The thread of one tracker: opens it, gives it what it is sent, and lets it take its time."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zerotop.outputs.points import Point

QUEUED = 10_000
"""Points that wait for one tracker; further ones are dropped and counted."""
BATCH = 200
RETRIES_S = (1.0, 5.0, 25.0)
TOLD_EVERY_S = 60.0


@dataclass(frozen=True)
class About:
    """The run, as a tracker lists it."""

    run: str
    """Name of the run directory."""
    name: str
    """Name there."""
    identity: str
    """16 hex digits that are the same in every attempt of the run, and in no other run."""
    folder: Path
    """The run directory, for files of the tracker's own."""
    config_folder: Path
    """What relative paths are relative to."""
    after: int = 0
    """Points come for the steps after this one; those of an earlier attempt beyond it do not count any more."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters."""


class Tracker(Protocol):
    """Everything is called in one thread. Any exception is reported; those of `write` after some tries with the same
    points."""

    def load(self) -> None:
        """Import what it needs, which takes seconds for some, before there is anything to write."""

    def open(self, about: About) -> str:
        """Connect, or continue what an earlier attempt has begun. Returns where the figures are, for people."""

    def write(self, points: Sequence[Point]) -> None:
        """Take points, in the order of their steps."""

    def close(self, good: bool) -> None:
        """The run has ended; `good`: finished or stopped."""


class TrackerThread:
    """Feeds one tracker. `report(text, severity)` is called for what people should know."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        about: Callable[[], About],
        report: Callable[[str, str], None],
        interval: int = 1,
        retries_s: Sequence[float] = RETRIES_S,
    ) -> None:
        """`about()` is called once, when there is something to write."""
        self.name = name
        self._tracker = tracker
        self._about = about
        self._report = report
        self._interval = interval
        self._retries_s = retries_s
        self._queue: queue.Queue[Point | bool] = queue.Queue(QUEUED)
        self._dropped = 0
        self._told_s = 0.0
        self._off = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, point: Point) -> None:
        """Queue a point; never waits."""
        if self._off or ("train/loss" in point.values and point.step % self._interval):
            return
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            self._dropped += 1
            now_s = time.monotonic()
            if now_s - self._told_s > TOLD_EVERY_S:
                self._told_s = now_s
                self._report(f"{self.name} does not keep up: {self._dropped:,} points dropped so far", "warning")

    def close(self, good: bool, deadline_s: float) -> None:
        """Write what is queued and end the tracker, until `deadline_s` on the monotonic clock."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put(good, timeout=max(0.0, deadline_s - time.monotonic()))
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            self._report(
                f"{self.name} was not done in time at the end of the run; its last points may be missing", "warning"
            )

    # ---- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._tracker.load()
            first = self._queue.get()
            if isinstance(first, bool):
                return  # the run ended before its first step
            self._report(f"{self.name}: {self._tracker.open(self._about())}", "info")
            batch: list[Point] = [first]
            while True:
                end = self._fill(batch)
                if batch:
                    self._write(batch)
                if end is not None:
                    self._tracker.close(end)
                    return
                batch = []
        except Exception as error:
            traceback.print_exc()  # into outputs.log
            self._report(f"{self.name} is off: {_text(error)}", "warning")
        finally:
            self._off = True

    def _fill(self, batch: list[Point]) -> bool | None:
        """Add what is queued, at least one point if there is none yet. Returns how the run ended, once it has."""
        while len(batch) < BATCH:
            try:
                item = self._queue.get(block=not batch)
            except queue.Empty:
                return None
            if isinstance(item, bool):
                return item
            batch.append(item)
        return None

    def _write(self, batch: list[Point]) -> None:
        for pause_s in (*self._retries_s, None):
            try:
                self._tracker.write(batch)
                return
            except Exception as error:
                if pause_s is None or self._closing.is_set():
                    raise
                self._report(f"{self.name}: {_text(error)}; trying again", "warning")
            self._closing.wait(pause_s)


def _text(error: Exception) -> str:
    """The first line of an error, with its kind where the text alone says little."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
