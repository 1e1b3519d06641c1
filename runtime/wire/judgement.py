"""What the hub finds by comparing the ranks: the verdict on the run, and where the time of its steps goes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from runtime.wire.base import Message
from runtime.wire.bounds import Count, Data, Finite, Name, RankNumber, Step, Text, WallSeconds, Word


class Verdict(Message):
    """The hub's judgement on the run, sent when it changes: what is wrong, or that nothing is."""

    kind: Literal["verdict"] = "verdict"
    what: Name
    """A stable keyword: "healthy", "straggler", "hang"... See zerotop/verdict/finding.py."""
    severity: Literal["info", "warning", "error"] = "info"
    ranks: list[RankNumber] = Field(default_factory=list)
    """The ranks that cause it; empty if none can be named."""
    text: Text
    """One sentence with its figures."""
    advice: Text = ""
    """What to do next, one sentence."""
    facts: Data = Field(default_factory=dict)
    """The figures behind the text, with units in their names."""
    step: Step | None = None
    since_wall_s: WallSeconds = 0.0


class TransferKind(BaseModel):
    """The transfers of one process group, operation and size of buffer. Bus bandwidth as in nccl-tests."""

    op: Word
    bytes: Count
    group: Name = "world"
    count: Count
    first_us: Finite | None = None
    """Median of the first ones after the warm-up."""
    now_us: Finite | None = None
    """Median of the newest ones."""
    best_us: Finite | None = None
    bus_bytes_per_s: Finite | None = None
    best_bus_bytes_per_s: Finite | None = None


class TimeReport(Message):
    """Where the time of the recent steps went, as the hub has found by comparing the ranks. Sent every few seconds."""

    kind: Literal["time_report"] = "time_report"
    steps: Count
    """How many steps the means are over."""
    parts_ms: dict[RankNumber, dict[Word, Finite]] = Field(default_factory=dict)
    """Rank -> part of the step -> milliseconds per step; the parts sum to the step (zerotop/state/breakdown.py)."""
    transfers: list[TransferKind] = Field(default_factory=list)
    """The groups, operations and sizes with the most bytes, at most 32."""
    meetings: Count = 0
    """Collectives that `bus_bytes_per_s` is over."""
    bus_bytes_per_s: Finite | None = None
    """Bus bandwidth of the newest collectives of all kinds together."""
