"""The cells of the rank table: each function adds one to the row of a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.style import Style

from runtime.wire.node import GpuStats
from zerotop.format import MISSING, bytes_text, count_text, ms_text, share_text, used_of
from zerotop.state.gpu import Concern
from zerotop.state.run import RankState
from zerotop.state.thresholds import COOL_C, FULL, WAITS_LONG, hottest_c, is_capped, is_hot, is_idle
from zerotop.state.waits import WaitWindow
from zerotop.tui.text import dots
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import stacked_bar
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.spark import relative_range, spark
from zerotop.tui.widgets.timeline import LastSteps

AFTER_ACCUMULATION = frozenset({"reduce", "step", "offload", "gather", "checkpoint", "paused"})
OUTCOMES = {
    "finished": ("✔", "success"),
    "stopped": ("■", "muted"),
    "aborted": ("✖", "error"),
    "failed": ("✖", "error"),
}


@dataclass(frozen=True)
class Context:
    """What every row of one drawing needs. last_steps: their strips of the last step."""

    view: View
    largest_bytes: int
    waits: WaitWindow
    stale_s: float
    concerns: Mapping[int, tuple[Concern, ...]]
    last_steps: LastSteps

    @property
    def trains(self) -> bool:
        """Whether steps are being taken: before, while it is paused and after the run, GPUs have little to do."""
        return self.view.state.state_name == "running" and self.waits.steps > 0


Draw = Callable[[Row, Context, RankState, GpuStats | None, int], None]
Value = Callable[[Context, RankState, GpuStats | None], float | None]


def _dim(context: Context, rank: RankState) -> Style | None:
    """Grey for a rank that has sent nothing for three ticks."""
    view = context.view
    old = rank.heard_ns and (view.state.hub_now_ns - rank.heard_ns) / 1e9 > context.stale_s
    return view.palette.style("muted") if (view.stale or old) and not view.ended else None


def draw_rank_number(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(str(rank.rank), size, _dim(context, rank) or Style(bold=True), right=True)


def draw_device(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.device if rank.hello else "…", size, _dim(context, rank) or PLAIN)


def draw_host(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.host if rank.hello else "", size, context.view.palette.style("muted"))


def draw_memory_bar(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    palette = context.view.palette
    if rank.memory is None:
        row.cell("no data yet", size, palette.style("muted"))
        return
    use = context.view.memory_uses[rank.rank]
    total = use.total_bytes if use.on_gpu and use.total_bytes else context.largest_bytes
    parts = [(name, count, palette.category(name)) for name, count in use.parts]
    row.extend(stacked_bar(parts, total, size, palette.style("border")))


def draw_used(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    if rank.memory is None:
        row.gap(size)
        return
    use = context.view.memory_uses[rank.rank]
    style = _dim(context, rank) or PLAIN
    if not use.on_gpu or not use.total_bytes:
        row.cell(bytes_text(use.used_bytes), size, style, right=True)
        return
    share = use.used_bytes / use.total_bytes
    if share >= FULL and style is PLAIN:
        style = context.view.palette.style("warning", bold=True)
    text = used_of(use.used_bytes, use.total_bytes)
    percent = share_text(use.used_bytes, use.total_bytes)
    row.cell(f"{text} {percent:>4}" if size >= len(text) + 5 else text, size, style, right=True)


def draw_last_step(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.extend(context.last_steps.strip(rank, context.view.palette, size), size)


def draw_phase(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    palette = context.view.palette
    phase, beat = rank.phase, rank.heartbeat
    if rank.goodbye is not None:
        glyph, colour = OUTCOMES[phase]
        row.cell(f"{glyph} {phase} at {rank.goodbye.step}", size, palette.style(colour))
        return
    if context.view.ended:
        row.cell("– ended", size, palette.style("muted"))
        return
    start = row.width
    dim = _dim(context, rank)
    if beat is not None and beat.micro_steps > 1:
        done = not beat.micro_step and phase in AFTER_ACCUMULATION
        most = 8 if size >= 26 else 4
        marks = "●" * min(beat.micro_steps, most) if done else dots(beat.micro_step, beat.micro_steps, most)
        row.add(marks, dim or palette.style("primary")).gap()
        if beat.micro_step:
            row.add(f"{beat.micro_step}/{beat.micro_steps} ", dim or PLAIN)
    stall = context.view.stall
    verdict = context.view.verdict
    blamed = stall is not None and rank.rank in (*stall.missing, *stall.silent)
    blamed = blamed or (context.view.blames(rank.rank) and verdict is not None and verdict.severity == "error")
    style = palette.style("error", bold=True) if blamed else dim or palette.phase_text(phase)
    row.cell(("▲ " if blamed else "") + phase, size - (row.width - start), style)


def draw_wait(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    wait_ms, step_ms = context.waits.waited_ms.get(rank.rank), context.waits.step_ms
    if wait_ms is None:
        row.cell(MISSING, size, context.view.palette.style("muted"), right=True)
        return
    text = _per_step(wait_ms, step_ms)
    high = wait_ms >= WAITS_LONG * step_ms > 0
    row.cell(text, size, _dim(context, rank) or (context.view.palette.style("warning") if high else PLAIN), right=True)


def draw_tokens(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    text = count_text(rank.step.tokens_per_s) if rank.step else ""
    row.cell(text, size, _dim(context, rank) or PLAIN, right=True)


def _per_step(time_ms: float, step_ms: float) -> str:
    share = time_ms / step_ms if step_ms else 0.0
    return f"{ms_text(time_ms)} {min(share, 1.0):>4.0%}"


def draw_cost(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    waits = context.waits
    blamed = context.view.blames(rank.rank)
    palette = context.view.palette
    style = palette.style("warning", bold=True) if blamed else _dim(context, rank) or palette.style("muted")
    text = _per_step(waits.caused_ms.get(rank.rank, 0.0), waits.step_ms) if waits.waited_ms else MISSING
    row.cell(("▲ " if blamed else "") + text, size, style, right=True)


def draw_step(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    step = rank.current_step
    row.cell("" if step is None else str(step), size, _dim(context, rank) or PLAIN, right=True)


def draw_pinned(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    count = rank.memory.pinned_bytes if rank.memory else 0
    row.cell(bytes_text(count), size, _dim(context, rank) or PLAIN, right=True)


def draw_rss(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(bytes_text(rank.memory.rss_bytes) if rank.memory else "", size, _dim(context, rank) or PLAIN, right=True)


def gpu_cell(text: Callable[[GpuStats], str | None], notable: Callable[[GpuStats], bool] | None = None) -> Draw:
    """`notable`: whether the figure has the colour of a warning while the run trains."""

    def draw(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
        palette = context.view.palette
        shown = text(gpu) if gpu is not None else None
        style = PLAIN if shown else palette.style("muted")
        if gpu is not None and notable is not None and context.trains and notable(gpu):
            style = palette.style("warning", bold=True)
        row.cell(shown or MISSING, size, _dim(context, rank) or style, right=True)

    return draw


def rounded(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.0f}{unit}"


def power_text(gpu: GpuStats) -> str | None:
    if gpu.power_w is None:
        return None
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W" if gpu.power_limit_w else f"{gpu.power_w:.0f} W"


def history_cell(
    field: str, top: Callable[[GpuStats], float | None], notable: Callable[[GpuStats], bool], bottom: float = 0.0
) -> Draw:
    """The curve of a field of GpuStats up to `top`, so that the curves of equal GPUs have one scale; where a GPU does
    not say what that is, up to its largest value."""

    def draw(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
        hello, palette = rank.hello, context.view.palette
        if hello is None or gpu is None:
            row.gap(size)
            return
        values = context.view.state.histories.of_gpu(hello.host, hello.device_uuid, field)
        style = palette.style("warning" if context.trains and notable(gpu) else "primary")
        high = top(gpu) or max(values, default=0.0)
        row.cell(spark(values, size, bottom, high), size, _dim(context, rank) or style, right=True)

    return draw


draw_util_history = history_cell("utilization_percent", lambda gpu: 100.0, is_idle)
draw_power_history = history_cell("power_w", lambda gpu: gpu.power_limit_w, is_capped)
draw_temperature_history = history_cell("temperature_c", hottest_c, is_hot, COOL_C)


def draw_step_history(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    values = context.view.state.histories.step_ms(rank.rank)
    low, high = relative_range(list(values)[-size:])
    style = _dim(context, rank) or context.view.palette.style("primary")
    row.cell(spark(values, size, low, high), size, style, right=True)


def draw_concern(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    found = context.concerns.get(rank.rank)
    if not found:
        row.cell("", size)
        return
    palette = context.view.palette
    row.cell(f"▲ {found[0].word}", size, _dim(context, rank) or palette.style(found[0].severity, bold=True))


def used_bytes(context: Context, rank: RankState, gpu: GpuStats | None) -> float | None:
    if rank.memory is None:
        return None
    use = context.view.memory_uses[rank.rank]
    return float(use.used_bytes)
