"""Everything that panels may show at a tick, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from zerotop.state.condition import Condition, condition_of
from zerotop.state.progress import Progress, progress
from zerotop.state.run import RunState
from zerotop.state.stall import Laggard, Stall, find_laggard, find_stall
from zerotop.tui.commands import CommandLife
from zerotop.tui.theme import Palette

TICK_S = 0.25


@dataclass(frozen=True)
class View:
    """`state` is what panels show, in a frozen view a copy; `condition` and `commands` (newest last) are live in
    that too. `age_s` is the time since the hub was heard."""

    state: RunState
    palette: Palette
    progress: Progress
    condition: Condition
    stall: Stall | None
    laggard: Laggard | None
    connection: str
    age_s: float
    stale: bool
    frozen: bool
    read_only: bool
    commands: tuple[CommandLife, ...]

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.state.state_name in {"stopped", "finished", "aborted", "failed"}


def build_view(
    state: RunState,
    palette: Palette,
    *,
    connection: str,
    age_s: float,
    frozen: bool,
    read_only: bool,
    commands: tuple[CommandLife, ...],
    laggard_before: int | None = None,
    live: RunState | None = None,
) -> View:
    """`live` is the current state if `state` is a copy. `laggard_before` is the rank that the previous view named;
    in doubt the verdict stays with it."""
    ended = state.state_name in {"stopped", "finished", "aborted", "failed"}
    stale = not ended and (age_s > stale_after_s(state) or connection not in {"live", "ended"})
    return View(
        state=state,
        palette=palette,
        progress=progress(state, connection),
        condition=condition_of(live or state, connection),
        stall=None if stale else find_stall(state),
        laggard=None if stale or state.state_name != "running" else find_laggard(state, laggard_before),
        connection=connection,
        age_s=age_s,
        stale=stale,
        frozen=frozen,
        read_only=read_only,
        commands=commands,
    )


def stale_after_s(state: RunState) -> float:
    """Data older than three missed ticks is drawn grey. A tick is that of the slower side, the ranks' telemetry or
    the probe's second."""
    hz = state.hello.telemetry_hz if state.hello else 1.0
    return 3 * max(1.0, 1 / hz if hz > 0 else 1.0)
