"""A heat map of ranks over steps: which rank came late, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.style import Style
from textual import events

from zerotop.format import ms_text, tick_text
from zerotop.state.run import RunState
from zerotop.tui.abilities import Figured, Zoomable
from zerotop.tui.lens import Lens
from zerotop.tui.panels.plots import PlotPanel
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row, ScrollPanel

LABEL = 6
TALLEST = 3
"""Lines of a rank, at most."""
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


class SkewMap(ScrollPanel, Zoomable, Figured):
    """Ranks are lines, steps are columns. Shares the cursor with the plots."""

    READS = ("collectives", "step")

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.chosen = 0
        self._count = 0
        self._values: dict[int, dict[int, float]] = {}
        self._step_ms: dict[int, float] = {}
        self._key: object = None
        self._steps: list[int] = []

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
        known = sorted(self._values)
        size = max(1, min(3, room // len(known)))
        self._steps = known[-(room // size) :]
        shades = {step: self._shade(step) for step in self._steps}
        styles = [palette.style(role) for role in RAMP]
        rows = []
        first, tall = self.scroll_offset.y, max(1, min(TALLEST, (height - 2) // max(1, self._count)))
        cursor = Style(bgcolor=palette.ui["panel"], underline=True)
        for rank in range(first, min(self._count, first + (height - 2) // tall)):
            for line in range(tall):
                row = Row().cell("" if line else f"{rank}", LABEL - 2, muted, right=True).gap(2)
                for step in self._steps:
                    shade = shades[step].get(rank, 0)
                    style = styles[shade] + cursor if step == view.lens.cursor else styles[shade]
                    row.add((SHADES[shade] if shade else "·") * size, style)
                rows.append(row)
        rows += [Row() for _ in range(height - 2 - len(rows))]
        return [*rows, self._axis(view, size, width), self._legend(view, width)][:height]

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
        """One cell is one step at least: there is nothing to zoom."""

    def pan_by(self, share: float) -> None:
        """Move the cursor by a tenth of what is shown."""
        self.move_cursor(round(math.copysign(max(1, len(self._steps) // 10), share)))

    def move_cursor(self, by: int) -> None:
        """Move the cursor along the steps that are shown."""
        if self.view is not None and self._steps:
            self._send(self.view.lens.moved(by, self._steps))

    def show_whole(self) -> None:
        """Remove the cursor."""
        if self.view is not None:
            self._send(replace(self.view.lens, cursor=None))

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None or self.view is None or not self._steps or offset.x < LABEL:
            return
        size = max(1, min(3, (self.scrollable_content_region.width - LABEL) // len(self._values)))
        at = min(len(self._steps) - 1, (offset.x - LABEL) // size)
        self._send(replace(self.view.lens, cursor=self._steps[at]))
