"""Recordings of runs that never were: ranks with phases and collectives at given times."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.wire.base import Message
from runtime.wire.messages import Collectives, Event, Phases
from tests.harness.fakehub import hello
from zerotop.hub.recorder import Recorder

MS = 10**6
STEP_MS = 100
WALL_S = 1_700_000_000.0
"""Wall time at the reference node's CLOCK_MONOTONIC 0."""


def messages_of(rank: int, steps: Iterable[int], mono_ns: int, late_us: int = 0) -> list[Message]:
    """Per step: data, forward, backward and step, which follow each other, and three collectives that end at the same
    moments on all ranks. mono_ns: the node's clock at step 0. late_us: what this rank waits more in each of them."""
    found: list[Message] = []
    for step in steps:
        begin = mono_ns + step * STEP_MS * MS
        bounds = [("data", 0, 10), ("forward", 10, 40), ("backward", 40, 90), ("step", 90, 100)]
        spans: list[Any] = [(name, step, 1, begin + start * MS, begin + end * MS) for name, start, end in bounds]
        found.append(Phases(rank=rank, micro_steps=1, spans=spans))
        records: list[Any] = [
            (3 * step + index + 1, op, 4096, begin + (at - 5) * MS, begin + at * MS, 4000 + late_us, 1000)
            for index, (op, at) in enumerate((("reduce_scatter", 60), ("reduce_scatter", 80), ("all_gather", 96)))
        ]
        found.append(Collectives(rank=rank, step=step, records=records))
    return found


def record(
    run: Path,
    steps: Iterable[int] = range(1, 11),
    ranks: int = 2,
    nodes: dict[int, tuple[str, int, float]] | None = None,
    attempt: int = 1,
) -> None:
    """Write RUN/recording.sqlite. nodes: rank -> (boot id, its CLOCK_MONOTONIC at step 0, its wall clock there)."""
    recorder = Recorder(run / "recording.sqlite", attempt)
    for rank in range(ranks):
        boot, mono_ns, wall_s = (nodes or {}).get(rank, ("b", 0, WALL_S))
        fields = {"boot_id": boot, "host": f"node-{boot}", "mono_ns": mono_ns, "wall_s": wall_s, "world_size": ranks}
        recorder.add(f"rank/{rank}", hello(rank, attempt=attempt, **fields))
        for message in messages_of(rank, steps, mono_ns, late_us=1000 * rank):
            recorder.add(f"rank/{rank}", message)
    recorder.add("supervisor", Event(rank=None, what="note", text="a note", wall_s=WALL_S + 0.5))
    recorder.close()
