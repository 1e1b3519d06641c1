"""Everything that panels may show at a tick, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from runtime.wire.judgement import Verdict
from runtime.wire.node import GpuStats
from zerotop.state.condition import Condition, condition_of
from zerotop.state.losstrend import EarlierRun
from zerotop.state.memory import MemoryUse, memory_use
from zerotop.state.progress import Progress, progress
from zerotop.state.run import RankState, RunState
from zerotop.state.stall import Stall, find_stall
from zerotop.tui.commands import CommandLife
from zerotop.tui.lens import Lens
from zerotop.tui.theme import Palette

TICK_S = 0.25


@dataclass(frozen=True)
class View:
    """`state` is what panels show, in a frozen view a copy; `condition`, `verdict` and `commands` (newest last) are
    live in that too. `age_s` is the time since the hub was heard."""

    state: RunState
    palette: Palette
    progress: Progress
    condition: Condition
    stall: Stall | None
    verdict: Verdict | None
    connection: str
    age_s: float
    stale: bool
    frozen: bool
    read_only: bool
    commands: tuple[CommandLife, ...]
    wall_s: float = 0.0
    """The time of day."""
    lens: Lens = field(default_factory=Lens)
    earlier: tuple[EarlierRun, ...] = ()
    """Runs to compare the loss with, the newest first."""
    host: str = ""
    """The machine of a run that is watched over SSH."""

    def blames(self, rank: int) -> bool:
        """Whether the verdict is bad news and names this rank."""
        verdict = self.verdict
        return verdict is not None and verdict.severity != "info" and rank in verdict.ranks and not self.ended

    def gpu_of(self, rank: RankState) -> GpuStats | None:
        """The probe's sample of the rank's device."""
        hello = rank.hello
        return self._gpus.get((hello.host, hello.device_uuid.removeprefix("GPU-"))) if hello is not None else None

    @cached_property
    def memory_uses(self) -> dict[int, MemoryUse]:
        """Rank -> its memory by use, for those that have reported it."""
        return {number: memory_use(rank.memory) for number, rank in sorted(self.state.ranks.items()) if rank.memory}

    @cached_property
    def _gpus(self) -> dict[tuple[str, str], GpuStats]:
        """(host, UUID) -> GPU, so that a table of 256 ranks does not search for each of them."""
        return {
            (host, gpu.uuid.removeprefix("GPU-")): gpu
            for host, node in self.state.nodes.items()
            for gpu in node.gpus or ()
        }

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
    live: RunState | None = None,
    wall_s: float = 0.0,
    lens: Lens | None = None,
    earlier: tuple[EarlierRun, ...] = (),
    host: str = "",
) -> View:
    """`live` is the current state if `state` is a copy."""
    ended = state.state_name in {"stopped", "finished", "aborted", "failed"}
    stale = not ended and (age_s > stale_after_s(state) or connection not in {"live", "ended", "replay"})
    condition = condition_of(live or state, connection)
    return View(
        state=state,
        palette=palette,
        progress=progress(state, connection, condition if live is None or live is state else None),
        condition=condition,
        stall=None if stale else find_stall(state),
        verdict=(live or state).verdict,
        connection=connection,
        age_s=age_s,
        stale=stale,
        frozen=frozen,
        read_only=read_only,
        commands=commands,
        wall_s=wall_s,
        lens=lens or Lens(),
        earlier=earlier,
        host=host,
    )


def stale_after_s(state: RunState) -> float:
    """Data older than three missed ticks is drawn grey. A tick is that of the slower side, the ranks' telemetry or
    the probe's second."""
    hz = state.hello.telemetry_hz if state.hello else 1.0
    return 3 * max(1.0, 1 / hz if hz > 0 else 1.0)
