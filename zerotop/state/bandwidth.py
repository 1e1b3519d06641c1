"""How fast collectives transfer, per operation and size, against the best that was seen in the run.

Bus bandwidth is the bytes that cross a rank's link per second, which is comparable across operations and world sizes
(nccl-tests, doc/PERFORMANCE.md): the buffer's bytes times a factor of the operation, over the time of the transfer.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

WORLD = "world"
"""The process group of all ranks, in which the engine's own collectives are."""
KEYS_KEPT = 256
"""Different (group, operation, bytes) whose transfers are kept; a model has fewer."""
RECENT = 40
BASELINE = 200
"""The first transfers of a kind after the warm-up, whose median is what this link usually does."""
WARM_UP = 5
NEEDED = 20
"""The baseline is taken in blocks of so many transfers."""
BLOCK_RATIO = 1.4
"""A block whose median is so many times the baseline so far is left out: a link that becomes slow before the baseline
is complete would otherwise pass for what it usually does."""


def bus_factor(op: str, world_size: int) -> float:
    """Bytes on a rank's link per byte of the buffer."""
    if world_size < 2:
        return 0.0
    part = (world_size - 1) / world_size
    return {"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part}.get(op, 1.0)


@dataclass
class Transfers:
    """The transfers of one group, operation and size, in microseconds."""

    op: str
    bytes: int
    group: str
    count: int = 0
    best_us: float = float("inf")
    usual_us: float | None = None
    """The median of `baseline_us`; None while too few are known."""
    baseline_us: list[int] = field(default_factory=list)
    block_us: list[int] = field(default_factory=list)
    """The newest transfers, before they join the baseline."""
    recent_us: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, transfer_us: int) -> None:
        """Take one transfer."""
        self.count += 1
        if self.count <= WARM_UP:
            return
        if transfer_us > 0:
            self.best_us = min(self.best_us, transfer_us)
        if len(self.baseline_us) < BASELINE:
            self.block_us.append(transfer_us)
            if len(self.block_us) == NEEDED:
                self._take_block()
        self.recent_us.append(transfer_us)

    def _take_block(self) -> None:
        """Add the block to the baseline, unless it is much slower."""
        block, self.block_us = self.block_us, []
        if self.usual_us is None or statistics.median(block) < BLOCK_RATIO * self.usual_us:
            self.baseline_us += block
            self.usual_us = statistics.median(self.baseline_us)

    def copy(self) -> Transfers:
        """An independent copy."""
        return Transfers(
            self.op,
            self.bytes,
            self.group,
            self.count,
            self.best_us,
            self.usual_us,
            list(self.baseline_us),
            list(self.block_us),
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
        self._kinds: dict[tuple[str, str, int], Transfers] = {}

    def copy(self) -> Bandwidth:
        """An independent copy."""
        other = Bandwidth()
        other._kinds = {key: kind.copy() for key, kind in self._kinds.items()}
        return other

    def add(self, op: str, nbytes: int, transfer_us: int, group: str = WORLD) -> float | None:
        """Take one transfer. Returns what one of its kind usually takes in microseconds; None while that is not known.
        Kinds beyond KEYS_KEPT displace the oldest."""
        kind = self._kinds.get((group, op, nbytes))
        if kind is None:
            while len(self._kinds) >= KEYS_KEPT:
                del self._kinds[next(iter(self._kinds))]
            kind = self._kinds[group, op, nbytes] = Transfers(op, nbytes, group)
        kind.add(transfer_us)
        return kind.usual_us

    def kinds(self) -> list[Transfers]:
        """All groups, operations and sizes, those with the most bytes first."""
        return sorted(self._kinds.values(), key=lambda kind: -kind.bytes * kind.count)
