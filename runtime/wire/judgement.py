"""What the hub finds: the verdict on the run, where the time of its steps goes, and which alerts of the config hold."""

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


class Alert(Message):
    """The state of one rule of zerotop.alerts, sent when it changes, and now and then while it fires."""

    kind: Literal["alert"] = "alert"
    name: Name
    rule: Text
    state: Literal["inactive", "pending", "firing", "resolved"]
    """pending: the condition holds, but not yet for the time that the rule asks for. resolved: it was firing, and is
    over."""
    severity: Literal["warning", "error"] = "warning"
    ranks: list[RankNumber] = Field(default_factory=list)
    """The ranks for which it holds; empty if it is about the run or a node."""
    text: Text = ""
    """The figures behind the state, without the name."""
    value: Finite | None = None
    """The figure furthest beyond the threshold, in the metric's base unit (bytes, seconds, shares of 1)."""
    step: Step | None = None
    since_wall_s: WallSeconds = 0.0
    """When this state began; of `verdict changes` the newest change."""


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
