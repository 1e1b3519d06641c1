"""A heat map of ranks over steps: which rank came late, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType

from zerotop.format import ms_text, tick_text
from zerotop.state.run import RunState
from zerotop.tui.abilities import Figured, Zoomable
from zerotop.tui.lens import Lens, extent
from zerotop.tui.panels.plots import PlotPanel
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row, fit

LABEL = 6
TALLEST, WIDEST = 3, 3
"""Lines of a rank, and cells of a step while none is zoomed, at most."""
SHADES = " ░▒▓█"
"""From nothing to the most: the picture can be read without colour."""
RAMP = ("border", "muted", "primary", "warning", "error")
"""Colour of [ui] of each shade."""
FLOOR_MS = 0.2
"""Less than this is noise."""


@dataclass(frozen=True)
class HeatFigure:
    """What the map shows."""

    title: str
    values: Callable[[RunState], dict[int, dict[int, float]]]


FIGURES = (
    HeatFigure("what the others waited for a rank", lambda state: state.waits.lateness_ms()),
    HeatFigure("what a rank waited for others", lambda state: state.waits.waiting_ms()),
)


class SkewMap(RankPanel, Zoomable, Figured):
    """Ranks are lines, steps are columns. Shares the range of steps and the cursor with the plots; Enter opens the
    selected rank."""

    READS = ("collectives", "step")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "select(-1)", "Previous rank", show=False),
        Binding("down,j", "select(1)", "Next rank", show=False),
        Binding("enter", "open", "Open rank", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.chosen = 0
        self._count = 0
        self._values: dict[int, dict[int, float]] = {}
        self._step_ms: dict[int, float] = {}
        self._key: object = None
        self._steps: list[int] = []
        """Those that are drawn."""
        self._step_cells = 1
        """Cells of a step."""

    def next_figure(self) -> None:
        """Switch between lateness and waiting."""
        self.chosen = (self.chosen + 1) % len(FIGURES)
        self._key = None
        self.redraw()

    def inputs(self, view: View) -> object:
        return super().inputs(view), view.lens

    def accept(self, view: View) -> None:
        meetings = view.state.waits.meetings
        key = (meetings[-1].seq if meetings else None, len(meetings), self.chosen)
        if key != self._key:
            self._key = key
            self._values = FIGURES[self.chosen].values(view.state)
            self._step_ms = view.state.waits.step_ms()
        self._count = view.state.world_size
        self.have_lines(self._count + 2)
        self.entitle(f"skew · {FIGURES[self.chosen].title} · g: the other{self._readout(view)}")

    def _readout(self, view: View) -> str:
        cursor = view.lens.cursor
        values = self._values.get(cursor) if cursor is not None else None
        if not values:
            return ""
        rank = max(values, key=lambda one: values[one])
        return f" │ step {cursor:,}: rank {rank} most, {ms_text(values[rank])}"

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette, muted = view.palette, view.palette.style("muted")
        if not self._values:
            return [Row().add("no step whose collectives all ranks have reported yet", muted)]
        room = max(1, width - LABEL)
        left, right = view.lens.window(extent(view.state))
        known = [step for step in sorted(self._values) if view.lens.whole or left <= step <= right]
        if not known:
            self._steps = []
            first, last = min(self._values), max(self._values)
            text = f"none of the steps {left:,.0f} to {right:,.0f} is here: the map has {first:,} to {last:,}"
            return [Row().add(fit(f"{text} · 0 shows them", width).rstrip(), muted)]
        size = self._step_cells = max(1, min(WIDEST if view.lens.whole else room, room // len(known)))
        self._steps = known[-(room // size) :]
        shades = {step: self._shade(step) for step in self._steps}
        styles = [palette.style(role) for role in RAMP]
        rows = []
        first, tall = self.scroll_offset.y, self._tall(height)
        cursor = Style(bgcolor=palette.ui["panel"], underline=True)
        for rank in range(first, min(self._count, first + (height - 2) // tall)):
            for line in range(tall):
                chosen = rank == self.selected
                row = Row().add("▌" if chosen else " ", palette.style("primary" if self.has_focus else "muted"))
                label = Style(bold=True) if chosen else muted
                row.cell("" if line else f"{rank}", LABEL - 3, label, right=True).gap(2)
                for step in self._steps:
                    shade = shades[step].get(rank, 0)
                    style = styles[shade] + cursor if step == view.lens.cursor else styles[shade]
                    row.add((SHADES[shade] if shade else "·") * size, style)
                rows.append(row)
        rows += [Row() for _ in range(height - 2 - len(rows))]
        return [*rows, self._axis(view, size, width), self._legend(view, width)][:height]

    def _tall(self, height: int) -> int:
        """Lines of a rank."""
        return max(1, min(TALLEST, (height - 2) // max(1, self._count)))

    def _shade(self, step: int) -> dict[int, int]:
        """Rank -> 0..4 by its share of the step's time: 1, 3, 10 and 30%."""
        step_ms = self._step_ms.get(step) or math.inf
        return {
            rank: sum(value / step_ms >= limit for limit in (0.01, 0.03, 0.1, 0.3)) if value >= FLOOR_MS else 0
            for rank, value in self._values[step].items()
        }

    def _axis(self, view: View, size: int, width: int) -> Row:
        muted = view.palette.style("muted")
        row = Row().add(" " * LABEL)
        cursor = view.lens.cursor
        for at, step in enumerate(self._steps):
            place = LABEL + at * size
            text = tick_text(step, 1)
            if step == cursor and row.width <= place:
                row.to(place).add("▲", view.palette.style("accent"))
            elif step % max(1, 10 // size * 2) == 0 and row.width <= place and place + len(text) <= width - 1:
                row.to(place).add(text, muted).gap()
        return row

    def _legend(self, view: View, width: int) -> Row:
        palette, muted = view.palette, view.palette.style("muted")
        row = Row().add(" " * LABEL).add("share of the step: ", muted)
        for shade, words in enumerate(("< 1%", "1%", "3%", "10%", "30% or more")):
            row.add((SHADES[shade] if shade else "·") * 2, palette.style(RAMP[shade])).add(f" {words}  ", muted)
        return row

    # ---- the lens --------------------------------------------------------------------------------------------------
    def _send(self, lens: Lens) -> None:
        self.post_message(PlotPanel.LensChanged(lens))

    def zoom_by(self, factor: float) -> None:
        """Show fewer steps, or more, here and in all plots."""
        if self.view is not None:
            self._send(self.view.lens.zoomed(factor, extent(self.view.state)))

    def pan_by(self, share: float) -> None:
        """Show earlier or later steps; with all of them in sight, move the cursor by a tenth of them."""
        if self.view is None:
            return
        if self.view.lens.whole:
            self.move_cursor(round(math.copysign(max(1, len(self._steps) // 10), share)))
        else:
            self._send(self.view.lens.panned(share, extent(self.view.state)))

    def move_cursor(self, by: int) -> None:
        """Move the cursor along the steps that the map has."""
        if self.view is not None and self._values:
            self._send(self.view.lens.moved(by, sorted(self._values)))

    def show_whole(self) -> None:
        """Show all steps, without a cursor."""
        if self.view is not None:
            self._send(replace(self.view.lens, cursor=None, first=None, last=None))

    # ---- the selected rank -----------------------------------------------------------------------------------------
    def action_select(self, by: int) -> None:
        """Select another rank."""
        self.select_rank(max(0, min(self._count - 1, self.selected + by)))

    def select_rank(self, number: int) -> None:
        self.selected = number
        height = self.scrollable_content_region.height
        self.scroll_line_into_view(number, (height - 2) // self._tall(height))
        self.redraw()

    def rank_at(self, column: int, line: int) -> int | None:
        height = self.scrollable_content_region.height
        number = self.scroll_offset.y + line // self._tall(height)
        return number if 0 <= line < height - 2 and number < self._count else None

    def on_click(self, event: events.Click) -> None:
        super().on_click(event)
        offset = event.get_content_offset(self)
        if offset is None or self.view is None or not self._steps or offset.x < LABEL:
            return
        at = min(len(self._steps) - 1, (offset.x - LABEL) // self._step_cells)
        self._send(replace(self.view.lens, cursor=self._steps[at]))
