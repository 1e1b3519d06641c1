"""One clock for all ranks of a run.

Ranks report CLOCK_MONOTONIC, which is one clock on a node, and a hello pairs it with the wall clock. So times of one
node need only that node's offset. Wall clocks of two nodes are never trusted: a collective ends on all ranks at the
same moment, up to a few microseconds, so the median difference of the ends of the same collectives aligns the nodes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.wire.messages import Hello

Ends = Mapping[tuple[int, int], int]
"""(attempt, number of the collective) -> its end in ns, on the clock of one node."""
NEEDED = 3
"""Fewer common collectives align nothing."""


@dataclass(frozen=True)
class NodeClock:
    """How the clock of one node (one boot of it) becomes wall time of the reference node."""

    host: str
    offset_ns: int
    """Added to CLOCK_MONOTONIC."""
    method: str
    """For the trace's metadata."""
    spread_us: float | None = None
    """Median deviation of the collectives' ends from the offset; None where no collectives were compared."""


class Clocks:
    """The clocks of the nodes of a run, by boot id."""

    def __init__(self, hellos: Sequence[Hello]) -> None:
        """hellos: of all ranks and attempts, oldest first. Rank 0's newest one names the reference node."""
        self._hellos = list(hellos)
        self._boot = {(hello.attempt, hello.rank): hello.boot_id for hello in hellos}
        zero = [hello for hello in hellos if hello.rank == 0] or self._hellos
        self.reference = zero[-1].boot_id if zero else ""
        self.nodes: dict[str, NodeClock] = {}
        for hello in hellos:  # the first hello of each boot: later pairs differ where the wall clock was set
            if hello.boot_id not in self.nodes:
                offset = round(hello.wall_s * 1e9) - hello.mono_ns
                self.nodes[hello.boot_id] = NodeClock(hello.host, offset, "CLOCK_MONOTONIC, and the wall clock once")

    @property
    def unaligned(self) -> list[str]:
        """Boots other than the reference's whose ranks took part in an attempt together with it."""
        attempts = {attempt for (attempt, _), boot in self._boot.items() if boot == self.reference}
        together = {boot for (attempt, _), boot in self._boot.items() if attempt in attempts}
        return sorted(together - {self.reference})

    def rank_on(self, boot_id: str) -> int | None:
        """A rank of the node."""
        return next((hello.rank for hello in reversed(self._hellos) if hello.boot_id == boot_id), None)

    def align(self, boot_id: str, reference: Ends, ends: Ends) -> None:
        """Move a node's clock so that the collectives that it has in common with the reference node end together."""
        node, here = self.nodes[boot_id], self.nodes[self.reference].offset_ns
        shifts = [(reference[key] + here) - (end + node.offset_ns) for key, end in ends.items() if key in reference]
        if len(shifts) < NEEDED:
            method = "the wall clock of its node: too few collectives in common with the reference node"
            self.nodes[boot_id] = NodeClock(node.host, node.offset_ns, method)
            return
        shift = round(statistics.median(shifts))
        spread = statistics.median(abs(one - shift) for one in shifts) / 1000
        method = f"ends of {len(shifts)} collectives in common with {self.nodes[self.reference].host}"
        self.nodes[boot_id] = NodeClock(node.host, node.offset_ns + shift, method, spread)

    def wall_ns(self, attempt: int, rank: int, mono_ns: int) -> int | None:
        """A rank's CLOCK_MONOTONIC as wall time of the reference node; None for a rank without a hello."""
        node = self.nodes.get(self._boot.get((attempt, rank), ""))
        return None if node is None else mono_ns + node.offset_ns

    def document(self) -> list[dict[str, object]]:
        """For the trace's metadata."""
        return [
            {"host": node.host, "reference": boot == self.reference, "clock": node.method, "spread_us": node.spread_us}
            for boot, node in self.nodes.items()
        ]
