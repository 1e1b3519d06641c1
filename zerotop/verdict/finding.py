"""What a rule says when it finds something."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.wire.judgement import Verdict

What = Literal[
    "failed",
    "dead",
    "wedged",
    "desync",
    "ended early",
    "hang",
    "hang in transfer",
    "no progress",
    "GPU fault",
    "memory-bound",
    "straggler",
    "contention",
    "slow link",
    "data starvation",
    "throttled",
    "offload-bound",
    "starting",
    "paused",
    "checkpoint",
    "evaluation",
    "compiling",
    "ended",
    "unwatched",
    "healthy",
]
"""failed: the ranks of an attempt have ended with an error. dead: a rank's process is gone. wedged: its process exists
and sends nothing. desync: ranks are in different collectives. ended early: ranks wait in a collective for one that has
finished. hang: a rank has not entered the collective in which the others wait. hang in transfer: all have entered it,
and it does not complete. no progress: the ranks stand still outside any collective. GPU fault: the driver has lost a
GPU, or its memory is bad. memory-bound: memory is so short that it costs time. straggler: the others wait for one
rank's computation. contention: other processes take the ranks' CPUs. slow link: transfers take longer than they did.
data starvation: steps wait for data. throttled: a GPU has lowered its clock. offload-bound: steps wait for updates or
copies on the host. unwatched: a wrapped command runs, and does not report its steps."""
Severity = Literal["info", "warning", "error"]
STANDSTILL: frozenset[str] = frozenset(
    {"failed", "dead", "wedged", "desync", "ended early", "hang", "hang in transfer", "no progress"}
)
"""No steps are being taken."""
PASSING: frozenset[str] = frozenset({"checkpoint", "evaluation", "compiling"})
"""Steps wait for a while, and go on by themselves."""
CALM: frozenset[str] = PASSING | {"starting", "paused", "ended", "unwatched", "healthy"}
"""Nothing is wrong."""


@dataclass(frozen=True)
class Finding:
    """`text` is one sentence with its figures, `advice` what to do next, `facts` the figures with units in their
    names. `cost` is the share of the steps' time that it costs, 0..1, where that is known."""

    what: What
    text: str
    severity: Severity = "warning"
    ranks: tuple[int, ...] = ()
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    cost: float = 0.0

    def same_as(self, other: Finding | None) -> bool:
        """Whether both blame the same ranks for the same thing; the figures may differ."""
        return other is not None and (self.what, self.ranks) == (other.what, other.ranks)

    def message(self, step: int | None, since_wall_s: float) -> Verdict:
        """As the hub publishes it."""
        return Verdict(
            what=self.what,
            severity=self.severity,
            ranks=list(self.ranks),
            text=self.text,
            advice=self.advice,
            facts=self.facts,
            step=step,
            since_wall_s=since_wall_s,
        )
