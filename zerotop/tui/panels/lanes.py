"""A lane per rank: its phases and micro-steps in true time, hatched where it waited for others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Reversible
from dataclasses import replace
from typing import ClassVar, TypeVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType

from zerotop.format import ms_text
from zerotop.state.run import RankState, RunState
from zerotop.tui.abilities import Zoomable
from zerotop.tui.panels.phases import phase_legend
from zerotop.tui.panels.plots import PlotPanel
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row, ScrollPanel
from zerotop.tui.widgets.scale import round_step
from zerotop.tui.widgets.timeline import Cell, Record, lane_cells, paint

Item = TypeVar("Item")
LABEL = 7
CHROME = 3
"""Lines above and below the lanes: time, steps, signs."""
STEPS_SHOWN = 3
"""Steps in sight at first."""
LEAST_NS = 1_000_000
FEWEST_COMMON = 3
"""Fewer common collectives align no clocks."""


class LanePanel(ScrollPanel, Zoomable):
    """The newest steps of all ranks on one time axis. `+` `-` zoom, Shift with an arrow pans, arrows move a cursor."""

    READS = ("phases", "collectives", "step")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "select(-1)", "Previous rank", show=False),
        Binding("down", "select(1)", "Next rank", show=False),
        Binding("k", "select(-1)", show=False),
        Binding("j", "select(1)", show=False),
        Binding("enter", "open", "Open rank", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.selected = 0
        self.span_ns = 0
        """What the width stands for; 0 until the first steps are known."""
        self.end_ns: int | None = None
        """The right edge; None while the newest phase is followed."""
        self.cursor_ns: int | None = None
        """The place of the cursor; its step is that of all plots."""
        self._cursor_step: int | None = None
        """The step in which it stands."""
        self._lens_cursor: int | None = None
        """The step of the plots' cursor when it was last looked at."""
        self._told: set[int | None] = set()
        """Steps that the plots have been told, and that have not come back from there yet."""
        self._count = 0
        self._shifts: dict[str, int] = {}
        """Host -> what is added to its clock."""

    def inputs(self, view: View) -> object:
        return super().inputs(view), view.lens.cursor

    def accept(self, view: View) -> None:
        self._count = max(max(view.state.ranks, default=-1) + 1, view.state.world_size)
        self.have_lines(self._count + CHROME)
        self._shifts = host_shifts(view.state)
        if not self.span_ns:
            self.span_ns = _steps_ns(view.state)
        if view.lens.cursor != self._lens_cursor and self.span_ns:
            self._lens_cursor = view.lens.cursor
            if view.lens.cursor not in self._told:
                self._take_cursor(view.lens.cursor, view.state)
            if view.lens.cursor == self._cursor_step:
                self._told.clear()
        where = "" if self.end_ns is None else " · scrolled back, 0 follows again"
        width = f" · {ms_text(self.span_ns / 1e6)} wide" if self.span_ns else ""
        self.entitle(f"timeline{width}{where}{self._readout(view.state)}")

    # ---- time ------------------------------------------------------------------------------------------------------
    def _shift(self, rank: RankState) -> int:
        return self._shifts.get(rank.hello.host, 0) if rank.hello is not None else 0

    def _bounds(self, state: RunState) -> tuple[int, int]:
        """The oldest and the newest end of a phase that is kept."""
        ranks = [rank for rank in state.ranks.values() if rank.spans]
        if not ranks:
            return 0, 0
        first = min(rank.spans[0][3] + self._shift(rank) for rank in ranks)
        return first, max(rank.spans[-1][4] + self._shift(rank) for rank in ranks)

    def _window(self, state: RunState) -> tuple[int, int]:
        """The times at the edges."""
        _, newest = self._bounds(state)
        end = newest if self.end_ns is None else self.end_ns
        return end - self.span_ns, end

    # ---- the cursor, which all plots share -------------------------------------------------------------------------
    def _times_of(self, step: int, state: RunState) -> tuple[int, int] | None:
        """When the selected rank, or else the first that has it, began and ended a step; None if none has it."""
        lanes = [state.ranks[number] for number in sorted(state.ranks, key=lambda one: (one != self.selected, one))]
        for rank in lanes:
            times = [(span[3], span[4]) for span in rank.spans if span[1] == step]
            if times:
                shift = self._shift(rank)
                return min(begin for begin, _ in times) + shift, max(end for _, end in times) + shift
        return None

    def _step_at(self, at_ns: int, state: RunState) -> int | None:
        """The step of the selected rank at a time: of its newest phase that had begun by then."""
        rank = state.ranks.get(self.selected)
        if rank is None:
            return None
        at = at_ns - self._shift(rank)
        return next((span[1] for span in reversed(rank.spans) if span[3] <= at), None)

    def _take_cursor(self, step: int | None, state: RunState) -> None:
        """Go to the step in which the cursor of the plots stands."""
        self._cursor_step = step
        times = self._times_of(step, state) if step is not None else None
        if times is None:
            self.cursor_ns = None
            return
        begin, end = times
        left, right = self._window(state)
        if self.cursor_ns is None or not begin <= self.cursor_ns < end:
            self.cursor_ns = begin
        if not left <= self.cursor_ns < right:
            oldest, newest = self._bounds(state)
            self._go_to((begin + end + self.span_ns) // 2, oldest + self.span_ns, newest)
        if self.end_ns is None:
            self.end_ns = self._window(state)[1]  # what is read should stand still

    def _share_cursor(self) -> None:
        """Tell the plots in which step the cursor stands."""
        if self.view is None:
            return
        state, lens = self.view.state, self.view.lens
        step = self._step_at(self.cursor_ns, state) if self.cursor_ns is not None else None
        if step != self._cursor_step or step != lens.cursor:
            self._cursor_step = step
            self._told.add(step)
            self.post_message(PlotPanel.LensChanged(replace(lens, cursor=step)))

    def _readout(self, state: RunState) -> str:
        rank = state.ranks.get(self.selected)
        if self.cursor_ns is None and self._cursor_step is not None:
            return f" │ step {self._cursor_step:,} is not among the phases that are kept"
        if self.cursor_ns is None or rank is None:
            return ""
        at = self.cursor_ns - self._shift(rank)
        for phase, step, micro, begin, end in reversed(rank.spans):
            if begin <= at < end:
                place = f"{phase} {micro}" if micro else phase
                return f" │ rank {self.selected}: {place} of step {step:,}, {ms_text((end - begin) / 1e6)}"
        return f" │ rank {self.selected}: between phases"

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def draw(self, view: View, width: int, height: int) -> list[Row]:
        state, palette, muted = view.state, view.palette, view.palette.style("muted")
        if not self.span_ns or not any(rank.spans for rank in state.ranks.values()):
            return [Row().add("no phase has ended yet", muted)]
        room = max(1, width - LABEL)
        start, end = self._window(state)
        rows = [self._axis(view, start, end, room), self._steps(view, start, end, room)]
        cursor = self._cell(self.cursor_ns, start, room)
        first, tall = self.scroll_offset.y, self._lane_lines(height)
        for number in range(first, min(self._count, first + (height - CHROME) // tall)):
            rank = state.ranks.get(number) or RankState(number)
            shift = self._shift(rank)
            spans = list(_within(rank.spans, start - shift, lambda span: span[4]))
            records: list[Record] = list(_within(rank.collectives, start - shift, lambda record: record[4]))
            cells = lane_cells(spans, records, start - shift, end - start, room)
            chosen = number == self.selected
            label = palette.style("primary" if self.has_focus else "muted")
            row = Row().add("▌" if chosen else " ", label).cell(str(number), LABEL - 3, Style(bold=chosen), right=True)
            rows.append(_lane(row.gap(2), cells, cursor, palette))
            if tall > 1:  # the names stand in the first line
                blank = Row().add("▌" if chosen else " ", label).gap(LABEL - 1)
                rows.append(_lane(blank, cells, cursor, palette, named=False))
            rows += [Row() for _ in range(tall - 2)]
        rows += [Row() for _ in range(height - 1 - len(rows))]
        return [*rows, phase_legend(view, width)][:height]

    def _lane_lines(self, height: int) -> int:
        """Lines of a lane: one, two, or two and a blank one, as there is room."""
        return max(1, min(3, (height - CHROME) // max(1, self._count)))

    def _cell(self, at_ns: int | None, start: int, room: int) -> int | None:
        if at_ns is None or not start <= at_ns < start + self.span_ns:
            return None
        return min(room - 1, int((at_ns - start) * room / self.span_ns))

    def _axis(self, view: View, start: int, end: int, room: int) -> Row:
        """Round times from the newest back."""
        muted = view.palette.style("muted")
        cells: list[tuple[str, Style]] = [("─", muted)] * room
        step_ms = round_step(self.span_ns / 1e6, max(1, room // 16))
        _, newest = self._bounds(view.state)
        number = int(-(end - newest) / 1e6 // step_ms)
        while True:
            at = newest - number * step_ms * 1e6
            if at < start:
                break
            text = "newest" if not number else f"-{ms_text(number * step_ms)}"
            cell = round((at - start) * room / self.span_ns)
            place = min(room - len(text), max(0, cell - len(text)))
            if cell <= room and place >= 0:
                cells[place : place + len(text)] = [(character, muted) for character in text]
            number += 1
        row = Row().gap(LABEL)
        for character, style in cells[:room]:
            row.add(character, style)
        return row

    def _steps(self, view: View, start: int, end: int, room: int) -> Row:
        """Where the steps of the selected rank begin."""
        row = Row().gap(LABEL)
        lane = view.state.ranks.get(self.selected)
        if lane is None:
            return row
        shift, seen = self._shift(lane), set()
        for _, step, _, begin, _ in lane.spans:
            if step not in seen and start <= begin + shift < end:
                place = LABEL + int((begin + shift - start) * room / self.span_ns)
                text = f"▾ step {step:,}"
                if row.width <= place and place + len(text) <= LABEL + room:
                    row.to(place).add(text, view.palette.style("primary"))
            seen.add(step)
        return row

    # ---- keys and mouse --------------------------------------------------------------------------------------------
    def action_select(self, by: int) -> None:
        """Select another lane."""
        self.selected = max(0, min(self._count - 1, self.selected + by))
        height = self.scrollable_content_region.height
        top, visible = self.scroll_offset.y, (height - CHROME) // self._lane_lines(height)
        if self.selected < top or self.selected >= top + visible:
            place = self.selected if self.selected < top else self.selected - visible + 1
            self.scroll_to(y=place, animate=False, immediate=True, force=True)
        self.redraw()

    def action_open(self) -> None:
        """Open the selected rank."""
        self.post_message(RankPanel.Opened(self.selected))

    def zoom_by(self, factor: float) -> None:
        """Show less time, or more, around the cursor or the right edge."""
        if self.view is None or not self.span_ns:
            return
        oldest, newest = self._bounds(self.view.state)
        start, end = self._window(self.view.state)
        span = int(min(max(LEAST_NS, self.span_ns / factor), max(LEAST_NS, newest - oldest)))
        if self.end_ns is not None or self.cursor_ns is not None:
            middle = self.cursor_ns if self.cursor_ns is not None else (start + end) // 2
            share = (end - middle) / self.span_ns
            self._go_to(middle + int(share * span), oldest + span, newest)
        self.span_ns = span
        self.redraw()

    def pan_by(self, share: float) -> None:
        """Show earlier or later phases."""
        if self.view is None or not self.span_ns:
            return
        oldest, newest = self._bounds(self.view.state)
        _, end = self._window(self.view.state)
        self._go_to(end + int(share * self.span_ns), oldest + self.span_ns, newest)
        self.redraw()

    def _go_to(self, end: int, least: int, newest: int) -> None:
        end = max(least, end)
        self.end_ns = None if end >= newest else end

    def move_cursor(self, by: int) -> None:
        """Move the cursor by cells."""
        if self.view is None or not self.span_ns:
            return
        start, end = self._window(self.view.state)
        room = max(1, self.scrollable_content_region.width - LABEL)
        cell = self.span_ns // room
        if self.cursor_ns is None:
            self.end_ns = end  # what is read should stand still
            self.cursor_ns = end - cell
        else:
            self.cursor_ns = max(start, min(end - 1, self.cursor_ns + by * cell))
        self._share_cursor()
        self.redraw()

    def show_whole(self) -> None:
        """Follow the newest phase again, as wide as at first."""
        self.end_ns = self.cursor_ns = None
        self.span_ns = _steps_ns(self.view.state) if self.view is not None else 0
        self._share_cursor()
        self.redraw()

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None or self.view is None or not self.span_ns:
            return
        tall = self._lane_lines(self.scrollable_content_region.height)
        line = self.scroll_offset.y + (offset.y - 2) // tall
        if offset.y >= 2 and 0 <= line < self._count:
            if line == self.selected and event.chain > 1:
                self.action_open()
                return
            self.selected = line
        if offset.x >= LABEL:
            start, end = self._window(self.view.state)
            self.end_ns = end
            room = max(1, self.scrollable_content_region.width - LABEL)
            self.cursor_ns = start + int((offset.x - LABEL + 0.5) * self.span_ns / room)
            self._share_cursor()
        self.redraw()

    def on_focus(self) -> None:
        self.redraw()

    def on_blur(self) -> None:
        self.redraw()


def _lane(row: Row, cells: list[Cell], cursor: int | None, palette: Palette, named: bool = True) -> Row:
    """The cells of a lane, and the cursor over them."""
    if cursor is None:
        return row.extend(paint(cells, palette, named))
    row.extend(paint(cells[:cursor], palette, named)).add("│", palette.style("accent", bold=True))
    return row.extend(paint(cells[cursor + 1 :], palette, named))


def _within(items: Reversible[Item], start: int, end_of: Callable[[Item], int]) -> Iterator[Item]:
    """Of items in the order of time, those that end after `start`, the newest first."""
    for item in reversed(items):
        if end_of(item) <= start:
            return
        yield item


def _steps_ns(state: RunState) -> int:
    """What STEPS_SHOWN steps take."""
    recent = state.series.recent_step_ms(20)
    return int(statistics.median(recent) * STEPS_SHOWN * 1e6) if recent else 0


def host_shifts(state: RunState) -> dict[str, int]:
    """Host -> what is to be added to its CLOCK_MONOTONIC so that all clocks agree with that of the lowest rank's host.
    A collective ends at the same moment everywhere: the median difference of these ends aligns two nodes. Ranks of one
    host share a clock."""
    hosts: dict[str, RankState] = {}
    for _, rank in sorted(state.ranks.items()):
        if rank.hello is not None and rank.hello.host not in hosts:
            hosts[rank.hello.host] = rank
    if len(hosts) < 2:
        return {}
    first, *others = hosts.items()
    ends = {record[0]: record[4] for record in first[1].collectives}
    shifts = {first[0]: 0}
    for host, rank in others:
        apart = [ends[record[0]] - record[4] for record in rank.collectives if record[0] in ends]
        if len(apart) >= FEWEST_COMMON:
            shifts[host] = round(statistics.median(apart))
        elif rank.spans and first[1].spans:  # nothing better is known
            shifts[host] = first[1].spans[-1][4] - rank.spans[-1][4]
    return shifts
