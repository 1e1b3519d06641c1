"""The arguments of the command `profile`, its files, and the event with which a rank hands in its part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_STEPS = 100
DEFAULT_STEPS = 3
DEFAULT_RANKS = 8
"""Without a choice, this many ranks are profiled, the lowest ones."""
PART = "profile part"
"""`Event.what` of a rank that has written its part. Its data: the command's `id` and `number`, all chosen `ranks`, the
first and the last `steps`, `path` (relative to the run directory; empty: there is none) and `problem`."""
DONE = "profile"
"""`Event.what` of the supervisor when the merged file is there. Its data: the command's `id`, and `path`."""
CLOCK = "zerotop.clock "
"""Name of a range that a profiled rank records at each boundary, followed by CLOCK_MONOTONIC in ns: it maps the
profiler's clock to that of telemetry."""


def profile_folder(run: Path, number: int) -> Path:
    """Where the ranks write their parts; number: the command's."""
    return run / "profiles" / str(number)


def part_path(run: Path, number: int, rank: int) -> Path:
    """The part of one rank."""
    return profile_folder(run, number) / f"rank-{rank}.json"


def check_profile(arguments: dict[str, Any], world_size: int) -> tuple[dict[str, Any], str]:
    """The arguments with their defaults filled in, and why they are not valid (empty: they are). world_size: 0 if it
    is not known yet."""
    unknown = [name for name in arguments if name not in ("steps", "ranks")]
    if unknown:
        return arguments, f"profile: unknown argument {', '.join(unknown)}; expected steps and ranks"
    steps = arguments.get("steps", DEFAULT_STEPS)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        return arguments, f"profile: steps: expected a whole number from 1 to {MAX_STEPS}, got {steps!r}"
    ranks = arguments.get("ranks")
    if ranks is None:
        ranks = list(range(min(world_size, DEFAULT_RANKS))) or [0]
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int for rank in ranks):
        return arguments, f"profile: ranks: expected a list of ranks, got {ranks!r}"
    wrong = [rank for rank in ranks if rank < 0 or (world_size and rank >= world_size)]
    if wrong:
        there = f"the run has ranks 0 to {world_size - 1}" if world_size else "ranks count from 0"
        return arguments, f"profile: ranks: {', '.join(map(str, wrong))}: {there}"
    return {"steps": steps, "ranks": sorted(set(ranks))}, ""


def ranks_text(ranks: Sequence[int]) -> str:
    """In words: rank 3; ranks 0, 1, 2."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
