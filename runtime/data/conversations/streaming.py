"""Micro-batches from streamed data; [Note: the stream] in stream.py says in which order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.data import DataError
from runtime.data.conversations.batches import Ahead, Batch, Sequences
from runtime.data.conversations.packing import hashed
from runtime.data.conversations.store import Store
from runtime.data.conversations.stream import Cursor, Segment, SegmentQueue, StreamSpec, next_cursor

_REMEMBERED = 3
_ORDER = 5  # purpose of the hash that orders a segment's sequences


@dataclass(frozen=True)
class _Loaded:
    """A segment in memory: its sequences, and `order`, the sequence at each of its places in the stream."""

    at: Segment
    sequences: Sequences
    order: np.ndarray
    following: Segment
    cursor: Cursor


class StreamingBatches:
    """One rank's micro-batches of every step of streamed data, like TrainingBatches.

    plan: makes sequences of a segment's store, for the segment's number.
    """

    def __init__(
        self,
        spec: StreamSpec,
        plan: Callable[[Store, int], Sequences],
        seed: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        pin: bool = False,
    ) -> None:
        self._plan, self._seed = plan, seed
        self.micro_batch, self.accumulation, self.rank, self.world = micro_batch, accumulation, rank, world
        self.global_batch = micro_batch * accumulation * world
        self._queue = SegmentQueue(spec)
        self._lock = threading.Lock()
        self._begun: list[Segment] = [Segment(0, 0, Cursor(), 0)]
        """Where the last few segments begin, the newest last."""
        self._loaded: list[_Loaded] = []
        self._step = 0
        self._ahead = Ahead(self._make, pin)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The `accumulation` micro-batches of this rank in optimizer step `step` (from 0)."""
        self._step = step
        yield from self._ahead.take(step)

    def trained_tokens(self, step: int) -> int:
        """Targets that the loss counts in the whole global batch of a step, over all ranks and micro-steps."""
        first = step * self.global_batch
        found = self._find(range(first, first + self.global_batch))
        return sum(int(loaded.sequences.plan.counted[number]) for loaded, number in found)

    def epoch(self, step: int) -> float:
        """Passes over the data completed before `step`; their number is known in whole segments only."""
        return float(self._find([step * self.global_batch])[0][0].at.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the last few segments begin."""
        with self._lock:
            return {"segments": [[one.number, one.first, *one.cursor, one.epoch] for one in self._begun]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called."""
        with self._lock:
            self._begun = [
                Segment(number, first, Cursor(source, row), epoch)
                for number, first, source, row, epoch in state["segments"]
            ]
            self._loaded = []

    def close(self) -> None:
        """End the thread and the process that prepare."""
        self._ahead.close()
        self._queue.close()

    def _make(self, step: int) -> list[Batch]:
        made = []
        for micro in range(self.accumulation):
            first = step * self.global_batch + (micro * self.world + self.rank) * self.micro_batch
            found = self._find(range(first, first + self.micro_batch))
            made.append(Sequences.gather([(loaded.sequences, number) for loaded, number in found]))
        return made

    def _find(self, places: range | list[int]) -> list[tuple[_Loaded, int]]:
        """(the segment, the sequence in it) at each place of the stream; places rise."""
        with self._lock:
            found = []
            for place in places:
                loaded = self._segment_of(place)
                found.append((loaded, int(loaded.order[place - loaded.at.first])))
            return found

    def _segment_of(self, place: int) -> _Loaded:
        for loaded in self._loaded:
            if loaded.at.first <= place < loaded.following.first:
                return loaded
        at = next((one for one in reversed(self._begun) if one.first <= place), Segment(0, 0, Cursor(), 0))
        empty_epochs = 0
        while True:
            loaded = self._load(at)
            if place < loaded.following.first:
                return loaded
            empty_epochs = (
                0 if loaded.following.first > at.first else empty_epochs + (loaded.following.epoch - at.epoch)
            )
            if empty_epochs > 1:
                raise DataError("zerotop.data.files: no row of the streamed data gives a sample")
            at = loaded.following

    def _load(self, at: Segment) -> _Loaded:
        store = self._queue.take(at.cursor)
        sequences = self._plan(store, at.number)
        cursor, ends = next_cursor(store)
        following = Segment(at.number + 1, at.first + len(sequences), cursor, at.epoch + ends)
        order = np.argsort(hashed(np.arange(len(sequences)), self._seed + at.number, _ORDER), kind="stable")
        loaded = _Loaded(at, sequences, order, following, at.cursor)
        earlier = [one for one in self._begun if one.number < at.number]
        self._begun = [*earlier[1 - _REMEMBERED :], at]
        outdated = [one for one in self._loaded if one.at.number not in (at.number - 1, at.number)]
        self._loaded = [*(one for one in self._loaded if one not in outdated), loaded]
        for one in outdated:
            if one.cursor not in (at.cursor, cursor, *(kept.cursor for kept in self._loaded)):
                self._queue.discard(one.cursor)
        if cursor != at.cursor:
            self._queue.begin(cursor)
        return loaded
