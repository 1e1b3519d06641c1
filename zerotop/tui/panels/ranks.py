"""The rank table: one line per rank, drawn line by line so that 256 of them cost next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message

from runtime.wire.node import GpuStats
from zerotop.format import MISSING, bytes_text, count_text, ms_text, used_of
from zerotop.state.gpu import Concern, concerns
from zerotop.state.memory import MemoryUse, gpu_of, memory_use
from zerotop.state.run import RankState
from zerotop.state.waits import WINDOW_STEPS, WaitWindow
from zerotop.tui.text import dots
from zerotop.tui.view import View, stale_after_s
from zerotop.tui.widgets.bar import stacked_bar
from zerotop.tui.widgets.lines import PLAIN, Row, ScrollPanel

AFTER_ACCUMULATION = frozenset({"reduce", "step", "offload", "gather", "checkpoint", "paused"})
OUTCOMES = {
    "finished": ("✔", "success"),
    "stopped": ("■", "muted"),
    "aborted": ("✖", "error"),
    "failed": ("✖", "error"),
}
ROOMY = 110
"""From this width on, bars and dots get more than the minimum."""


@dataclass(frozen=True)
class _Context:
    """What every row of one drawing needs."""

    view: View
    largest_bytes: int
    waits: WaitWindow
    stale_s: float
    concerns: Mapping[int, tuple[Concern, ...]]


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    """In cells; for the bar the minimum (it takes what is left)."""
    worth: int
    """Columns of the lowest worth are left out first when the line is too short."""
    draw: Callable[[Row, _Context, RankState, GpuStats | None, int], None]
    right: bool = False
    gpu: bool = False


class RankTable(ScrollPanel):
    """The ranks, one per line. Enter opens the selected one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "select(-1)", "Previous rank", show=False, id="rank.up"),
        Binding("down", "select(1)", "Next rank", show=False, id="rank.down"),
        Binding("k", "select(-1)", show=False),
        Binding("j", "select(1)", show=False),
        Binding("pageup", "select(-10)", show=False),
        Binding("pagedown", "select(10)", show=False),
        Binding("home", "select(-1000)", show=False),
        Binding("end", "select(1000)", show=False),
        Binding("enter", "open", "Open rank", show=False, id="rank.open"),
    ]

    class Selected(Message):
        """The selection moved to another rank."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            super().__init__()

    class Opened(Message):
        """The user opened a rank."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            super().__init__()

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.selected = 0
        self._count = 0
        self._concerned = False
        """Whether a GPU has been out of order: from then on the table has a column for it, so that it does not jump."""

    @property
    def rows_wanted(self) -> int:
        """Lines for all ranks, the column titles and the borders."""
        return max(1, self._count) + 1 + self.gutter.height

    def accept(self, view: View) -> None:
        super().accept(view)
        count = max(max(view.state.ranks, default=-1) + 1, view.state.world_size)
        if count != self._count:
            self._count = count
            self.virtual_size = Size(0, count + 1)
        on_gpu = any(r.memory is not None and r.memory.allocated_bytes is not None for r in view.state.ranks.values())
        kind = "VRAM" if on_gpu else "RSS, bars against the largest rank"
        title = f"1 ranks · memory: {kind} · waits: last {WINDOW_STEPS} steps"
        self.entitle(title)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        if not view.state.ranks:
            return [Row().add("waiting for ranks to connect".center(width), muted)]
        uses = [memory_use(rank.memory) for rank in view.state.ranks.values() if rank.memory]
        waits = view.state.waits.window()
        found = concerns(view.state)
        self._concerned = self._concerned or bool(found)
        context = _Context(
            view,
            max((use.used_bytes for use in uses), default=0),
            waits,
            stale_after_s(view.state),
            found,
        )
        columns = _choose(view, width, self._concerned)
        fixed = sum(column.width + 1 for column in columns)
        sizes = [column.width + (width - fixed if column.title == "memory" else 0) for column in columns]
        head = Row()
        for column, size in zip(columns, sizes, strict=True):
            head.cell(column.title, size, muted, right=column.right).gap()
        rows = [head]
        first = self.scroll_offset.y
        for number in range(first, min(first + height - 1, self._count)):
            rows.append(self._rank(context, number, columns, sizes, width))
        return rows

    def _rank(self, context: _Context, number: int, columns: list[_Column], sizes: list[int], width: int) -> Row:
        state = context.view.state
        rank = state.ranks.get(number) or RankState(number)
        gpu = gpu_of(state, rank)
        row = Row()
        row.add(
            "▌" if number == self.selected else " ",
            context.view.palette.style("primary" if self.has_focus else "muted"),
        )
        for column, size in zip(columns, sizes, strict=True):
            start = row.width
            column.draw(row, context, rank, gpu, size - (1 if start == 1 else 0))
            row.to(start + size - (1 if start == 1 else 0) + 1)
        return row

    # ---- keys and mouse --------------------------------------------------------------------------------------------
    def action_select(self, by: int) -> None:
        """Move the selection."""
        if not self._count:
            return
        self.select_rank(min(self._count - 1, max(0, self.selected + by)))

    def action_open(self) -> None:
        """Open the selected rank."""
        self.post_message(self.Opened(self.selected))

    def select_rank(self, number: int) -> None:
        """Select a rank and scroll it into view."""
        self.selected = number
        visible = self.scrollable_content_region.height - 1
        top = self.scroll_offset.y
        if number < top:
            self.scroll_to(y=number, animate=False)
        elif visible > 0 and number >= top + visible:
            self.scroll_to(y=number - visible + 1, animate=False)
        self.redraw()
        self.post_message(self.Selected(number))

    def on_click(self, event: events.Click) -> None:
        line = event.get_content_offset_capture(self).y - 1
        number = self.scroll_offset.y + line
        if line >= 0 and number < self._count:
            if number == self.selected and event.chain > 1:
                self.action_open()
            else:
                self.select_rank(number)

    def on_focus(self) -> None:
        self.redraw()

    def on_blur(self) -> None:
        self.redraw()


# ---- columns -------------------------------------------------------------------------------------------------------
def _dim(context: _Context, rank: RankState) -> Style | None:
    """Grey for a rank that has sent nothing for three ticks."""
    view = context.view
    old = rank.heard_ns and (view.state.hub_now_ns - rank.heard_ns) / 1e9 > context.stale_s
    return view.palette.style("muted") if (view.stale or old) and not view.ended else None


def _number(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(str(rank.rank), size, _dim(context, rank) or Style(bold=True), right=True)


def _device(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.device if rank.hello else "…", size, _dim(context, rank) or PLAIN)


def _host(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(rank.hello.host if rank.hello else "", size, context.view.palette.style("muted"))


def _memory(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    palette = context.view.palette
    if rank.memory is None:
        row.cell("no data yet", size, palette.style("muted"))
        return
    use = memory_use(rank.memory)
    total = use.total_bytes if use.on_gpu and use.total_bytes else context.largest_bytes
    parts = [(name, count, palette.category(name)) for name, count in use.parts]
    row.extend(stacked_bar(parts, total, size, palette.style("border")))


def _used(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    if rank.memory is None:
        row.gap(size)
        return
    use: MemoryUse = memory_use(rank.memory)
    text = used_of(use.used_bytes, use.total_bytes) if use.on_gpu and use.total_bytes else bytes_text(use.used_bytes)
    row.cell(text, size, _dim(context, rank) or PLAIN, right=True)


def _phase(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
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


def _wait(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    wait_ms, step_ms = context.waits.waited_ms.get(rank.rank), context.waits.step_ms
    if wait_ms is None:
        row.cell(MISSING, size, context.view.palette.style("muted"), right=True)
        return
    text = _per_step(wait_ms, step_ms)
    high = wait_ms >= 0.25 * step_ms > 0
    row.cell(text, size, _dim(context, rank) or (context.view.palette.style("warning") if high else PLAIN), right=True)


def _tokens(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    text = count_text(rank.step.tokens_per_s) if rank.step else ""
    row.cell(text, size, _dim(context, rank) or PLAIN, right=True)


def _per_step(time_ms: float, step_ms: float) -> str:
    share = time_ms / step_ms if step_ms else 0.0
    return f"{ms_text(time_ms)} {min(share, 1.0):>4.0%}"


def _cost(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    waits = context.waits
    blamed = context.view.blames(rank.rank)
    palette = context.view.palette
    style = palette.style("warning", bold=True) if blamed else _dim(context, rank) or palette.style("muted")
    text = _per_step(waits.caused_ms.get(rank.rank, 0.0), waits.step_ms) if waits.waited_ms else MISSING
    row.cell(("▲ " if blamed else "") + text, size, style, right=True)


def _step(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    step = rank.current_step
    row.cell("" if step is None else str(step), size, _dim(context, rank) or PLAIN, right=True)


def _pinned(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    count = rank.memory.pinned_bytes if rank.memory else 0
    row.cell(bytes_text(count), size, _dim(context, rank) or PLAIN, right=True)


def _rss(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    row.cell(bytes_text(rank.memory.rss_bytes) if rank.memory else "", size, _dim(context, rank) or PLAIN, right=True)


def _gpu_cell(
    text: Callable[[GpuStats], str | None],
) -> Callable[[Row, _Context, RankState, GpuStats | None, int], None]:
    def draw(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
        shown = text(gpu) if gpu is not None else None
        style = _dim(context, rank) or (PLAIN if shown else context.view.palette.style("muted"))
        row.cell(shown or MISSING, size, style, right=True)

    return draw


def _rounded(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.0f}{unit}"


def _power(gpu: GpuStats) -> str | None:
    if gpu.power_w is None:
        return None
    return f"{gpu.power_w:.0f}/{gpu.power_limit_w:.0f} W" if gpu.power_limit_w else f"{gpu.power_w:.0f} W"


def _concern(row: Row, context: _Context, rank: RankState, gpu: GpuStats | None, size: int) -> None:
    found = context.concerns.get(rank.rank)
    if not found:
        row.cell("", size)
        return
    palette = context.view.palette
    row.cell(f"▲ {found[0].word}", size, _dim(context, rank) or palette.style(found[0].severity, bold=True))


COLUMNS = (
    _Column("rank", 5, 100, _number, right=True),
    _Column("device", 8, 40, _device),
    _Column("memory", 12, 90, _memory),
    _Column("used", 15, 80, _used, right=True),
    _Column("RSS", 9, 20, _rss, right=True, gpu=True),
    _Column("pinned", 9, 25, _pinned, right=True),
    _Column("phase", 19, 95, _phase),
    _Column("wait per step", 13, 70, _wait, right=True),
    _Column("cost to others", 15, 35, _cost, right=True),
    _Column("GPU alarm", 15, 75, _concern, gpu=True),
    _Column("tokens/s", 8, 60, _tokens, right=True),
    _Column("step", 7, 15, _step, right=True),
    _Column("util", 5, 32, _gpu_cell(lambda gpu: _rounded(gpu.utilization_percent, "%")), right=True, gpu=True),
    _Column("power", 9, 31, _gpu_cell(_power), right=True, gpu=True),
    _Column("temp", 5, 30, _gpu_cell(lambda gpu: _rounded(gpu.temperature_c, "°C")), right=True, gpu=True),
    _Column("clock", 8, 29, _gpu_cell(lambda gpu: _rounded(gpu.sm_clock_mhz, " MHz")), right=True, gpu=True),
    _Column("host", 12, 10, _host),
)


def _choose(view: View, width: int, concerned: bool) -> list[_Column]:
    """The columns that fit, in their order; the least important ones are left out first. Widths depend on what this
    run can show at all."""
    ranks = view.state.ranks.values()
    on_gpu = any(rank.memory is not None and rank.memory.allocated_bytes is not None for rank in ranks)
    many_micro = any(rank.heartbeat is not None and rank.heartbeat.micro_steps > 4 for rank in ranks)
    hosts = {rank.hello.host for rank in ranks if rank.hello}
    columns: list[_Column] = []
    for column in COLUMNS:
        if (column.gpu and not on_gpu) or (column.title == "host" and len(hosts) < 2):
            continue
        if column.title == "GPU alarm" and not concerned:
            continue
        if column.title == "memory" and width >= ROOMY:
            column = _resized(column, 20)
        if column.title == "used" and not on_gpu:
            column = _resized(column, 9)
        if column.title == "phase" and many_micro and width >= ROOMY:
            column = _resized(column, 26)
        columns.append(column)
    while len(columns) > 1 and sum(column.width + 1 for column in columns) > width:
        columns.remove(min(columns, key=lambda column: column.worth))
    return columns


def _resized(column: _Column, width: int) -> _Column:
    return _Column(column.title, width, column.worth, column.draw, column.right, column.gpu)
