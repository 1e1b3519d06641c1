"""The rank table: one line per rank, drawn line by line so that 256 of them cost next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType

from zerotop.state.gpu import Concern, concerns
from zerotop.state.run import RankState
from zerotop.state.waits import WINDOW_STEPS
from zerotop.tui.abilities import Filterable
from zerotop.tui.panels.rank_cells import Context
from zerotop.tui.panels.rank_columns import (
    STRIPS_FROM,
    SUMMARIES,
    Column,
    columns_for,
    sorted_ranks,
    sorts_of,
    summary_rows,
)
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.view import View, stale_after_s
from zerotop.tui.widgets.lines import Row
from zerotop.tui.widgets.timeline import LastSteps

PINNED_FROM = 16
"""With more ranks, those that the verdict blames stand first."""
MEDIAN_FROM = 9
"""From so many ranks on, a last line has the median of each column; where all ranks are in sight, others have the
smallest and the largest value."""


def passes(view: View, number: int, wanted: str, alarms: Sequence[Concern]) -> bool:
    """Whether a filter lets a rank through; an empty one lets all."""
    if not wanted:
        return True
    rank = view.state.ranks.get(number) or RankState(number)
    words = [f"rank {number}", rank.phase, *(one.word for one in alarms)]
    if rank.hello is not None:
        words += [rank.hello.device, rank.hello.host]
    return wanted.lower() in " ".join(words).lower() or wanted == str(number)


class RankTable(RankPanel, Filterable):
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

    READS = ("memory", "step", "node")
    FLICKERS = ("heartbeat", "phases", "collectives")
    FILTER_HINT = "rank 3, cuda:1, a host, a phase, an alarm …"

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.selected = 0
        self.sort = "rank"
        self.reverse = False
        self.filter = ""
        self.count = 0
        """The number of ranks."""
        self._order: list[int] = []
        """The ranks that are shown, in the order of their lines."""
        self._drawing: Context | None = None
        self._last_steps = LastSteps()
        self._concerns: dict[int, tuple[Concern, ...]] = {}
        self._looked_at: tuple[int, ...] = ()
        self._concerned = False
        """Whether a GPU has been out of order: from then on the table has a column for it, so that it does not jump."""

    @property
    def rows_wanted(self) -> int:
        """Lines for all ranks, the column titles, the smallest, median and largest values, and the borders."""
        return self.rows_least + (len(SUMMARIES) - 1 if self.count >= MEDIAN_FROM else 0)

    @property
    def rows_least(self) -> int:
        """The same with the medians alone."""
        return max(1, self.count) + 1 + int(self.count >= MEDIAN_FROM) + self.gutter.height

    def _summaries(self, height: int) -> list[str]:
        """The names of the rows below the ranks, in `height` lines."""
        ranks = len(self._order)
        if ranks < MEDIAN_FROM or height < 6:
            return []
        return list(SUMMARIES) if ranks + 1 + len(SUMMARIES) <= height else ["med"]

    def inputs(self, view: View) -> object:
        return super().inputs(view), view.verdict, view.stall

    def notice(self, view: View) -> None:
        self.count = max(max(view.state.ranks, default=-1) + 1, view.state.world_size)

    def accept(self, view: View) -> None:
        self._drawing = self._make_drawing(view)
        alarms = self._drawing.concerns
        shown = [number for number in range(self.count) if passes(view, number, self.filter, alarms.get(number, ()))]
        if self.sort != "rank" or self.reverse:
            shown = sorted_ranks(self._drawing, shown, self.sort, self.reverse)
        elif len(shown) > PINNED_FROM:  # those in trouble stay in sight
            shown.sort(key=lambda number: (not view.blames(number), number))
        if shown != self._order:
            self._order = shown
        self.have_lines(len(shown) + 1 + int(len(shown) >= MEDIAN_FROM))
        on_gpu = any(r.memory is not None and r.memory.allocated_bytes is not None for r in view.state.ranks.values())
        kind = "VRAM" if on_gpu else "RSS, bars against the largest rank"
        title = f"ranks · memory: {kind} · waits: last {WINDOW_STEPS} steps"
        if self.sort != "rank" or self.reverse:
            title += f" · sorted by {self.sort} {'▲' if self.reverse else '▼'}"
        if self.filter:
            title += f" · filter “{self.filter}” · {len(shown)} of {self.count}"
        self.entitle(title)

    def _make_drawing(self, view: View) -> Context:
        nodes = view.state.revision(("node", "hello"))
        if nodes != self._looked_at:
            self._looked_at, self._concerns = nodes, concerns(view.state)
        found = self._concerns
        if self.size.width >= STRIPS_FROM:
            self._last_steps.look(view.state.ranks.values())
        self._concerned = self._concerned or bool(found)
        return Context(
            view,
            max((use.used_bytes for use in view.memory_uses.values()), default=0),
            view.state.waits.window(),
            stale_after_s(view.state),
            found,
            self._last_steps,
        )

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        if not view.state.ranks or self._drawing is None:
            return [Row().add("waiting for ranks to connect".center(width), muted)]
        if not self._order:
            return [Row().add("no rank matches the filter · Esc clears it".center(width), muted)]
        columns = columns_for(view, width, self._concerned)
        fixed = sum(column.width + 1 for column in columns)
        sizes = [column.width + (width - fixed if column.title == "memory" else 0) for column in columns]
        head = Row()
        for column, size in zip(columns, sizes, strict=True):
            style = view.palette.style("accent") if column.title == self.sort != "rank" else muted
            head.cell(column.title, size, style, right=column.right).gap()
        rows = [head]
        first, last = self.scroll_offset.y, self.scroll_offset.y + height - 1
        summaries = self._summaries(height)
        for number in self._order[first : last - len(summaries)]:
            rows.append(self._rank(self._drawing, number, columns, sizes))
        if summaries:
            rows += [Row()] * (height - len(summaries) - len(rows))
            rows += summary_rows(self._drawing, self._order, columns, sizes, summaries)
        return rows

    def _rank(self, context: Context, number: int, columns: list[Column], sizes: list[int]) -> Row:
        rank = context.view.state.ranks.get(number) or RankState(number)
        gpu = context.view.gpu_of(rank)
        chosen = number == self.selected
        row = Row()
        row.add("▌" if chosen else " ", context.view.palette.style("primary" if self.has_focus else "muted"))
        for column, size in zip(columns, sizes, strict=True):
            start = row.width
            column.draw(row, context, rank, gpu, size - (1 if start == 1 else 0))
            row.to(start + size - (1 if start == 1 else 0) + 1)
        return row

    # ---- sort and filter -------------------------------------------------------------------------------------------
    def next_sort(self) -> None:
        """Sort by the next column that the run has figures for."""
        if self.view is not None:
            sorts = sorts_of(self.view)
            self.sort = sorts[(sorts.index(self.sort) + 1) % len(sorts)] if self.sort in sorts else "rank"
            self.redraw()

    def reverse_sort(self) -> None:
        """Turn the order round."""
        self.reverse = not self.reverse
        self.redraw()

    def set_filter(self, text: str) -> None:
        """Show only ranks whose number, device, host, phase or alarm contains `text`."""
        self.filter = text.strip()
        self.redraw()

    # ---- keys and mouse --------------------------------------------------------------------------------------------
    def action_select(self, by: int) -> None:
        """Move the selection."""
        if self._order:
            place = self._order.index(self.selected) if self.selected in self._order else 0
            self.select_rank(self._order[min(len(self._order) - 1, max(0, place + by))])

    def select_rank(self, number: int) -> None:
        self.selected = number
        place = self._order.index(number) if number in self._order else 0
        height = self.scrollable_content_region.height
        self.scroll_line_into_view(place, height - 1 - len(self._summaries(height)))
        self.tell_selected()

    def rank_at(self, column: int, line: int) -> int | None:
        place = self.scroll_offset.y + line - 1
        return self._order[place] if line >= 1 and place < len(self._order) else None
