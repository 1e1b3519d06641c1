"""What each kind of collective costs: bytes, time, the part that training waited for, and bus bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.wire.judgement import TransferKind
from zerotop.state.bandwidth import bus_factor
from zerotop.state.run import RunState
from zerotop.state.waits import Meeting


@dataclass(frozen=True)
class Operation:
    """Collectives of one operation and size of buffer. Times are means over the newest ones, in ms."""

    op: str
    bytes: int
    per_step: float
    """How many of them a step has."""
    count: int
    """How many the times are over."""
    transfer_ms: float | None
    """What the last rank to arrive needed; None if that is not known, as the next two."""
    exposed_ms: float | None
    """For how long training threads were blocked, mean over the ranks."""
    skew_ms: float | None
    """From the first rank to the last."""
    bus_bytes_per_s: float | None
    best_bus_bytes_per_s: float | None = None

    @property
    def exposed_per_step_ms(self) -> float:
        """What it costs a step."""
        return (self.exposed_ms or 0.0) * self.per_step


def operations(state: RunState) -> list[Operation]:
    """All kinds of the newest collectives that every rank has reported, the one that costs most first; and those that a
    trainer that is not ours has counted."""
    kinds: dict[tuple[str, int], list[Meeting]] = {}
    for meeting in state.waits.meetings:
        kinds.setdefault((meeting.op, meeting.bytes), []).append(meeting)
    best = {(kind.op, kind.bytes): kind.best_us for kind in state.waits.bandwidth.kinds()}
    told = {(kind.op, kind.bytes): kind for kind in state.time_report.transfers} if state.time_report else {}
    world = state.world_size
    found = [_operation(key, those, world, best.get(key), told.get(key)) for key, those in kinds.items()]
    known = {(one.op, one.bytes) for one in found}
    found += [_from_report(kind) for key, kind in told.items() if key not in known]
    found += _counted(state)
    return sorted(found, key=lambda one: (-one.exposed_per_step_ms, -one.bytes, one.op))


def _operation(
    key: tuple[str, int], meetings: list[Meeting], world: int, best_us: float | None, told: TransferKind | None
) -> Operation:
    op, nbytes = key
    crossed = nbytes * bus_factor(op, world)
    transfer_us = statistics.fmean(one.transfer_us for one in meetings)
    best = crossed / (best_us / 1e6) if best_us and best_us != float("inf") else None
    if best is None and told is not None:
        best = told.best_bus_bytes_per_s
    return Operation(
        op,
        nbytes,
        len(meetings) / _steps(meetings),
        len(meetings),
        transfer_us / 1000,
        statistics.fmean(one.exposed_us for one in meetings) / 1000,
        statistics.fmean(one.skew_us for one in meetings) / 1000,
        crossed / (transfer_us / 1e6) if transfer_us and crossed else None,
        best,
    )


def _counted(state: RunState) -> list[Operation]:
    """Of rank 0's newest such step. Times of single collectives are not known, but for their durations where torch has
    measured them on every rank: that of the rank that came last is the shortest."""
    ranks = [rank.counted for rank in state.ranks.values() if rank.counted]
    first = state.ranks.get(0)
    found = []
    for op, nbytes, count, _ in first.counted if first is not None else ():
        means = [mean for counted in ranks for other, size, _, mean in counted if (other, size) == (op, nbytes)]
        known = [mean for mean in means if mean is not None]
        transfer_ms = min(known) if len(known) == len(state.ranks) else None
        crossed = nbytes * bus_factor(op, state.world_size) if op == "all_reduce" else 0.0  # others' buffers are larger
        rate = crossed / (transfer_ms / 1000) if transfer_ms and crossed else None
        found.append(Operation(op, nbytes, count, count, transfer_ms, None, None, rate))
    return found


def _steps(meetings: Iterable[Meeting]) -> int:
    steps = [one.step for one in meetings]
    return max(1, max(steps) - min(steps) + 1)


def _from_report(kind: TransferKind) -> Operation:
    """A kind that only the hub has seen: this screen came late."""
    transfer = (kind.now_us or 0.0) / 1000
    return Operation(
        kind.op, kind.bytes, 0.0, kind.count, transfer, 0.0, 0.0, kind.bus_bytes_per_s, kind.best_bus_bytes_per_s
    )
