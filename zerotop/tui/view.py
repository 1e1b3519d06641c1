"""What panels are given at a tick: one object with everything they may show."""

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
    """`state`: what panels show, a still picture in a frozen view; `condition` and `commands` (newest last) are live in
    that one, too; `age_s`: since anything was heard."""

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
    """`live`: the run as it is now, where `state` is a still picture of it. `laggard_before`: the rank that the view
    before this one named; a verdict in doubt stays with it.
    """
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
    """Data older than three missed ticks is grey: a tick is what the slower side promises, the ranks' telemetry or
    the probe's second.
    """
    hz = state.hello.telemetry_hz if state.hello else 1.0
    return 3 * max(1.0, 1 / hz if hz > 0 else 1.0)
