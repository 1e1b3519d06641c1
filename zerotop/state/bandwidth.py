"""How fast collectives transfer, per operation and size, against the best that was seen in the run.

Bus bandwidth is the bytes that cross a rank's link per second, which is comparable across operations and world sizes
(nccl-tests, doc/PERFORMANCE.md): the buffer's bytes times a factor of the operation, over the time of the transfer.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

KEYS_KEPT = 256
"""Different (operation, bytes) whose transfers are kept; a model has fewer."""
RECENT = 40
BASELINE = 200
"""The first transfers of a kind after the warm-up, whose median is what this link usually does."""
WARM_UP = 5
NEEDED = 20
"""Fewer transfers in the baseline give none."""


def bus_factor(op: str, world_size: int) -> float:
    """Bytes on a rank's link per byte of the buffer."""
    if world_size < 2:
        return 0.0
    part = (world_size - 1) / world_size
    return {"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part}.get(op, 1.0)


@dataclass
class Transfers:
    """The transfers of one operation and size, in microseconds."""

    op: str
    bytes: int
    count: int = 0
    best_us: float = float("inf")
    usual_us: float | None = None
    """The median of `baseline_us`; None while too few are known."""
    baseline_us: list[int] = field(default_factory=list)
    recent_us: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, transfer_us: int) -> None:
        """Take one transfer."""
        self.count += 1
        if self.count <= WARM_UP:
            return
        if transfer_us > 0:
            self.best_us = min(self.best_us, transfer_us)
        if len(self.baseline_us) < BASELINE:
            self.baseline_us.append(transfer_us)
            if len(self.baseline_us) % NEEDED == 0:
                self.usual_us = statistics.median(self.baseline_us)
        self.recent_us.append(transfer_us)

    def copy(self) -> Transfers:
        """An independent copy."""
        return Transfers(
            self.op,
            self.bytes,
            self.count,
            self.best_us,
            self.usual_us,
            list(self.baseline_us),
            self.recent_us.copy(),
        )

    @property
    def now_us(self) -> float | None:
        """The median of the newest ones."""
        return statistics.median(self.recent_us) if self.recent_us else None

    def bus_bytes_per_s(self, transfer_us: float | None, world_size: int) -> float | None:
        """Bus bandwidth of a transfer of this kind that takes `transfer_us`."""
        if not transfer_us or transfer_us == float("inf"):
            return None
        return self.bytes * bus_factor(self.op, world_size) / (transfer_us / 1e6)


class Bandwidth:
    """The transfers of all collectives that every rank has reported."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], Transfers] = {}

    def copy(self) -> Bandwidth:
        """An independent copy."""
        other = Bandwidth()
        other._kinds = {key: kind.copy() for key, kind in self._kinds.items()}
        return other

    def add(self, op: str, nbytes: int, transfer_us: int) -> float | None:
        """Take one transfer. Returns what one of its kind usually takes in microseconds; None while that is not known.
        Kinds beyond KEYS_KEPT displace the oldest."""
        kind = self._kinds.get((op, nbytes))
        if kind is None:
            while len(self._kinds) >= KEYS_KEPT:
                del self._kinds[next(iter(self._kinds))]
            kind = self._kinds[op, nbytes] = Transfers(op, nbytes)
        kind.add(transfer_us)
        return kind.usual_us

    def kinds(self) -> list[Transfers]:
        """All operations and sizes, those with the most bytes first."""
        return sorted(self._kinds.values(), key=lambda kind: -kind.bytes * kind.count)
