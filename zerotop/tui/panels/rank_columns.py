"""The columns of the rank table: which of them fit, and what stands in each cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.style import Style

from runtime.wire.node import GpuStats
from zerotop.format import MISSING, bytes_text, count_text, ms_text, share_text, used_of
from zerotop.state.gpu import Concern
from zerotop.state.run import RankState
from zerotop.state.thresholds import FULL, WAITS_LONG, is_capped, is_hot, is_idle
from zerotop.state.waits import WaitWindow
from zerotop.tui.text import dots
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import stacked_bar
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.timeline import LastSteps

AFTER_ACCUMULATION = frozenset({"reduce", "step", "offload", "gather", "checkpoint", "paused"})
OUTCOMES = {
    "finished": ("✔", "success"),
    "stopped": ("■", "muted"),
    "aborted": ("✖", "error"),
    "failed": ("✖", "error"),
}
ROOMY = 110
"""From this width on, bars and dots get more than the minimum."""
STRIPS_FROM = 150
"""From this width on, each rank has its last step as a strip."""


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


@dataclass(frozen=True)
class Column:
    """`value` is what is sorted by and of which the last row has the median, written by `write`."""

    title: str
    width: int
    """In cells; for the bar the minimum (it takes what is left)."""
    worth: int
    """Columns of the lowest worth are left out first when the line is too short."""
    draw: Draw
    right: bool = False
    gpu: bool = False
    value: Value | None = None
    write: Callable[[float], str] = str


# ---- cells ---------------------------------------------------------------------------------------------------------
def _dim(context: Context, rank: RankState) -> Style | None:
    """Grey for a rank that has sent nothing for three ticks."""
    view = context.view
    old = rank.heard_ns and (view.state.hub_now_ns - rank.heard_ns) / 1e9 > context.stale_s
    return view.palette.style("muted") if (view.stale or old) and not view.ended else None


def _number(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(str(rank.rank), size, _dim(context, rank) or Style(bold=True), right=True)


def _device(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.device if rank.hello else "…", size, _dim(context, rank) or PLAIN)


def _host(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.host if rank.hello else "", size, context.view.palette.style("muted"))


def _memory(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    palette = context.view.palette
    if rank.memory is None:
        row.cell("no data yet", size, palette.style("muted"))
        return
    use = context.view.memory_uses[rank.rank]
    total = use.total_bytes if use.on_gpu and use.total_bytes else context.largest_bytes
    parts = [(name, count, palette.category(name)) for name, count in use.parts]
    row.extend(stacked_bar(parts, total, size, palette.style("border")))


def _used(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
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


def _strip(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.extend(context.last_steps.strip(rank, context.view.palette, size), size)


def _phase(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
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


def _wait(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    wait_ms, step_ms = context.waits.waited_ms.get(rank.rank), context.waits.step_ms
    if wait_ms is None:
        row.cell(MISSING, size, context.view.palette.style("muted"), right=True)
        return
    text = _per_step(wait_ms, step_ms)
    high = wait_ms >= WAITS_LONG * step_ms > 0
    row.cell(text, size, _dim(context, rank) or (context.view.palette.style("warning") if high else PLAIN), right=True)


def _tokens(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    text = count_text(rank.step.tokens_per_s) if rank.step else ""
    row.cell(text, size, _dim(context, rank) or PLAIN, right=True)


def _per_step(time_ms: float, step_ms: float) -> str:
    share = time_ms / step_ms if step_ms else 0.0
    return f"{ms_text(time_ms)} {min(share, 1.0):>4.0%}"


def _cost(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    waits = context.waits
    blamed = context.view.blames(rank.rank)
    palette = context.view.palette
    style = palette.style("warning", bold=True) if blamed else _dim(context, rank) or palette.style("muted")
    text = _per_step(waits.caused_ms.get(rank.rank, 0.0), waits.step_ms) if waits.waited_ms else MISSING
    row.cell(("▲ " if blamed else "") + text, size, style, right=True)


def _step(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    step = rank.current_step
    row.cell("" if step is None else str(step), size, _dim(context, rank) or PLAIN, right=True)


def _pinned(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    count = rank.memory.pinned_bytes if rank.memory else 0
    row.cell(bytes_text(count), size, _dim(context, rank) or PLAIN, right=True)


def _rss(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(bytes_text(rank.memory.rss_bytes) if rank.memory else "", size, _dim(context, rank) or PLAIN, right=True)


def _gpu_cell(text: Callable[[GpuStats], str | None], notable: Callable[[GpuStats], bool] | None = None) -> Draw:
    """`notable`: whether the figure has the colour of a warning while the run trains."""

    def draw(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
        palette = context.view.palette
        shown = text(gpu) if gpu is not None else None
        style = PLAIN if shown else palette.style("muted")
        if gpu is not None and notable is not None and context.trains and notable(gpu):
            style = palette.style("warning", bold=True)
        row.cell(shown or MISSING, size, _dim(context, rank) or style, right=True)

    return draw


def _rounded(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.0f}{unit}"


def _power(gpu: GpuStats) -> str | None:
    if gpu.power_w is None:
        return None
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W" if gpu.power_limit_w else f"{gpu.power_w:.0f} W"


def _concern(row: Row, context: Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    found = context.concerns.get(rank.rank)
    if not found:
        row.cell("", size)
        return
    palette = context.view.palette
    row.cell(f"▲ {found[0].word}", size, _dim(context, rank) or palette.style(found[0].severity, bold=True))


def _used_share(context: Context, rank: RankState, gpu: GpuStats | None) -> float | None:
    if rank.memory is None:
        return None
    use = context.view.memory_uses[rank.rank]
    return float(use.used_bytes)


COLUMNS = (
    Column("rank", 5, 100, _number, right=True, value=lambda context, rank, gpu: -float(rank.rank)),
    Column("device", 8, 40, _device),
    Column("memory", 12, 90, _memory, value=_used_share, write=bytes_text),
    Column("used", 15, 80, _used, right=True, value=_used_share, write=bytes_text),
    Column("RSS", 9, 20, _rss, right=True, gpu=True),
    Column("pinned", 9, 25, _pinned, right=True),
    Column("phase", 19, 95, _phase),
    Column("last step, ╱ waiting", 24, 34, _strip),
    Column(
        "wait per step",
        13,
        70,
        _wait,
        right=True,
        value=lambda context, rank, gpu: context.waits.waited_ms.get(rank.rank),
        write=ms_text,
    ),
    Column(
        "cost to others",
        15,
        35,
        _cost,
        right=True,
        value=lambda context, rank, gpu: context.waits.caused_ms.get(rank.rank, 0.0),
        write=ms_text,
    ),
    Column("GPU alarm", 15, 75, _concern, gpu=True),
    Column(
        "tokens/s",
        8,
        60,
        _tokens,
        right=True,
        value=lambda context, rank, gpu: rank.step.tokens_per_s if rank.step is not None else None,
        write=count_text,
    ),
    Column("step", 7, 15, _step, right=True),
    Column(
        "util",
        5,
        32,
        _gpu_cell(lambda gpu: _rounded(gpu.utilization_percent, "%"), is_idle),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.utilization_percent if gpu is not None else None,
        write=lambda value: f"{value:.0f}%",
    ),
    Column(
        "power",
        9,
        31,
        _gpu_cell(_power, is_capped),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.power_w if gpu is not None else None,
        write=lambda value: f"{value:.0f} W",
    ),
    Column(
        "temp",
        5,
        30,
        _gpu_cell(lambda gpu: _rounded(gpu.temperature_c, "°C"), is_hot),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.temperature_c if gpu is not None else None,
        write=lambda value: f"{value:.0f}°C",
    ),
    Column("clock", 8, 29, _gpu_cell(lambda gpu: _rounded(gpu.sm_clock_mhz, " MHz")), right=True, gpu=True),
    Column("host", 12, 10, _host),
)
SORTS = ("rank", "cost to others", "wait per step", "memory", "tokens/s", "util", "power", "temp")
"""Titles of the columns that the table can be sorted by, in the order of the key."""


def sorts_of(view: View) -> list[str]:
    """Those of SORTS that this run has figures for."""
    there = {column.title for column in columns_for(view, 10_000, False)}
    return [title for title in SORTS if title in there]


def sorted_ranks(context: Context, numbers: Sequence[int], title: str, reverse: bool) -> list[int]:
    """The ranks in the order of a column, the largest value first (of ranks the lowest); those without come last."""
    value = next(column.value for column in COLUMNS if column.title == title)
    assert value is not None
    state = context.view.state
    known: list[tuple[float, int]] = []
    unknown: list[int] = []
    for number in numbers:
        rank = state.ranks.get(number) or RankState(number)
        found = value(context, rank, context.view.gpu_of(rank))
        if found is None:
            unknown.append(number)
        else:
            known.append((found, number))
    known.sort(key=lambda one: (one[0] if reverse else -one[0], one[1]))
    return [number for _, number in known] + unknown


def median_row(context: Context, numbers: Sequence[int], columns: Sequence[Column], sizes: Sequence[int]) -> Row:
    """The median of each column that has figures."""
    view, muted = context.view, context.view.palette.style("muted")
    row = Row()
    for column, size in zip(columns, sizes, strict=True):
        start = row.width
        if column.title == "rank":
            row.cell("med", size, muted, right=True)
        elif column.value is not None and column.title != "memory":
            ranks = [view.state.ranks.get(number) or RankState(number) for number in numbers]
            values = [column.value(context, rank, view.gpu_of(rank)) for rank in ranks]
            known = [value for value in values if value is not None]
            row.cell(column.write(statistics.median(known)) if known else "", size, muted, right=column.right)
        row.to(start + size + 1)
    return row


def columns_for(view: View, width: int, concerned: bool) -> list[Column]:
    """The columns that fit, in their order; the least important ones are left out first. Widths depend on what this
    run can show at all."""
    ranks = view.state.ranks.values()
    on_gpu = any(rank.memory is not None and rank.memory.allocated_bytes is not None for rank in ranks)
    many_micro = any(rank.heartbeat is not None and rank.heartbeat.micro_steps > 4 for rank in ranks)
    hosts = {rank.hello.host for rank in ranks if rank.hello}
    columns: list[Column] = []
    for column in COLUMNS:
        if (column.gpu and not on_gpu) or (column.title == "host" and len(hosts) < 2):
            continue
        if column.title == "GPU alarm" and not concerned:
            continue
        if column.title == "memory" and width >= ROOMY:
            column = _resized(column, 20)
        if column.title == "used":
            column = _resized(column, 9 if not on_gpu else 20 if width >= STRIPS_FROM else 15)
        if column.title == "last step, ╱ waiting" and (width < STRIPS_FROM or not any(rank.spans for rank in ranks)):
            continue
        if column.title == "phase" and many_micro and width >= ROOMY:
            column = _resized(column, 26)
        columns.append(column)
    while len(columns) > 1 and sum(column.width + 1 for column in columns) > width:
        columns.remove(min(columns, key=lambda column: column.worth))
    return columns


def _resized(column: Column, width: int) -> Column:
    return replace(column, width=width)
