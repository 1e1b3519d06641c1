"""1: the run on one screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.host import ROWS_LEAST, HostPanel
from zerotop.tui.panels.memory import Legend, MemoryPanel
from zerotop.tui.panels.phases import PhaseLegend
from zerotop.tui.panels.plots import LEARNING, SPEED, PlotPanel
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.panels.summary import SummaryPanel
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.view import View

EVENTS_LEAST = 5
SUMMARY_LEAST = 3
"""Lines of the summary of a run that has ended: the commands that it ends with."""
MANY_LINES = 10_000
GRID_FROM = 16
"""With more ranks than this, of which the table does not show all, they are a grid."""
RANKS_FIRST = 8
"""This many ranks are visible before plots and events get more than their minimum."""
LEGEND_FROM = 38
"""Lines from which the letters of the strips are explained."""
HOST_LINE_FROM = 22
"""Narrow: lines from which the host has one of them."""


@dataclass(frozen=True)
class Heights:
    """Lines of each part; 0: not shown. Together they are never more than there are."""

    table: int
    legend: int
    middle: int
    host_line: int
    events: int
    low: bool = False


def share_out_ended(room: int, wanted: int, title_lines: int) -> Heights:
    """The same for a run that has ended: beside the ranks, there are only its summary and its events."""
    least = SUMMARY_LEAST + 2 + 2 * (title_lines - 1)
    eight = min(RANKS_FIRST + title_lines, room - least)
    table = max(min(room, 4), min(wanted, max(room - 13 - EVENTS_LEAST, eight)))
    return Heights(table, 0, 0, 0, room - table)


def share_out(room: int, narrow: bool, wanted: int, title_lines: int, side: int, bars: bool = True) -> Heights:
    """How `room` lines are shared. The rank table is as high as its ranks (`wanted`) while the rest stays readable;
    then the memory panel is as high as its categories, and the host gets what is left of the `side`, at least its
    first lines. `title_lines` are those of the table that show no rank; `bars`: it has bars, and needs a legend."""
    if narrow:
        legend, host_line = int(bars and room >= 14), int(room >= HOST_LINE_FROM)
        table = max(min(room, 4), min(wanted, room - legend - host_line - 8))
        rest = room - legend - host_line - table
        middle = min(10, max(5, rest // 2)) if rest >= 8 else 0
        return Heights(table, legend, middle, host_line, rest - middle)
    eight = min(RANKS_FIRST + title_lines, room - 9)
    table = max(min(room, 4), min(wanted, max(room - 13 - EVENTS_LEAST, eight)))
    rest = room - table
    if rest - EVENTS_LEAST >= side:
        middle = max(rest * 3 // 5, side)
        return Heights(table, 0, middle, 0, rest - middle)
    host_line = 1 if rest >= 12 else 0
    rest -= host_line
    middle = max(rest * 3 // 5, min(11, rest - EVENTS_LEAST), 5) if rest >= 8 else 0
    return Heights(table, 0, middle, host_line, rest - middle, low=True)


class OverviewPage(Page):
    """Ranks, loss, throughput, memory, host and events; of a run that has ended, its summary in place of the plots."""

    KEY: ClassVar[str] = "1"
    NAME: ClassVar[str] = "Overview"
    COMPANION: ClassVar[str] = "5"

    def __init__(self) -> None:
        super().__init__(id="overview")
        self._asked: tuple[object, ...] = ()
        """What `fit` has last seen."""
        self._fitted: tuple[Heights, Widget | None, bool, Widget] | None = None
        self._ranks, self._phases, self._summary = (
            RankTable(id="ranks"),
            PhaseLegend(id="phases"),
            SummaryPanel(id="summary"),
        )
        self._middle, self._events = Horizontal(id="middle"), EventPanel(id="events", title="6 events")
        self._grid = RankGrid(id="grid")
        self.ranks: RankTable | RankGrid = self._ranks
        """What shows the ranks."""
        self._wants_grid: bool | None = None
        """What the user has chosen; None: the grid where the table would not show all of many ranks."""
        self._memory, self._host = MemoryPanel(id="memory"), HostPanel(id="host")

    def compose(self) -> ComposeResult:
        yield self._ranks
        yield self._grid
        yield Legend(id="legend")
        yield self._phases
        yield self._summary
        with self._middle:
            yield PlotPanel("5", LEARNING, id="learning")
            yield PlotPanel("5", SPEED, id="speed")
            with Vertical(id="side"):
                yield self._memory
                yield self._host
        yield HostPanel(id="host-line")
        yield self._events

    def on_mount(self) -> None:
        self.query_one("#host-line").can_focus = False
        self._summary.add_class("-absent")
        self._grid.add_class("-absent")

    def first_focus(self) -> Widget | None:
        return self.ranks

    def show_view(self, view: View) -> None:
        super().show_view(view)
        if self.has_class("-ended") != view.ended:
            self._summary.set_class(not view.ended, "-absent")
            self.set_class(view.ended, "-ended")
        self.fit()  # it chooses between table and grid
        room = self.size.height >= LEGEND_FROM
        strips = self.ranks is self._ranks and not view.ended
        legend = room and strips and self._phases.wanted(view, self.size.width)
        if self._phases.display != legend:
            self._phases.display = legend
            self.fit()

    def fit(self) -> None:
        """Give each part its height. A zoomed panel has none of its own: that would limit it."""
        if not self._nodes or not self.is_attached or not self.size.height:
            return
        asked: tuple[object, ...] = (
            self.outer_size,
            self.screen.outer_size,
            self._ranks.count,
            self._grid.hosts,
            self._wants_grid,
            self._memory.lines_wanted,
        )
        asked += (self._phases.display, self.screen.maximized, self.classes)
        if asked == self._asked:
            return
        self._asked = asked
        middle, events, summary = self._middle, self._events, self._summary
        memory, host = self._memory, self._host
        ended, maximized = self.has_class("-ended"), self.screen.maximized
        narrow = self.screen.has_class("-narrow")
        room = self.size.height - int(self._phases.display)
        side = memory.rows_wanted + ROWS_LEAST + host.gutter.height
        title_lines = 1 + self.ranks.gutter.height

        def shared(wanted: int, bars: bool = True) -> Heights:
            if ended:
                return share_out_ended(room, wanted, title_lines)
            return share_out(room, narrow, wanted, title_lines, side, bars)

        most = shared(MANY_LINES).table
        self._show_ranks(self._grid if self._grid_is_better(most) else self._ranks)
        if self.has_class("-resized"):
            return
        table = self.ranks
        wanted = self._ranks.rows_wanted if table is self._ranks else self._grid.rows_wanted(self.size.width, most)
        heights = shared(wanted, table is self._ranks)
        if (heights, maximized, ended, table) == self._fitted:
            return
        self._fitted = (heights, maximized, ended, table)
        self.set_class(heights.low, "-low")
        for part, lines in (("legend", heights.legend), ("middle", heights.middle), ("host-line", heights.host_line)):
            self.set_class(not lines, f"-no-{part}")
        self.set_class(heights.events <= 0, "-no-events")
        for panel, lines in self._lines(heights, ended, table, middle, summary, events):
            panel.styles.height = None if maximized is panel else max(lines, 1)

    # ---- table or grid ---------------------------------------------------------------------------------------------
    def switch_ranks(self) -> None:
        """Show the ranks as a grid instead of a table, or the reverse, from now on."""
        self._wants_grid = self.ranks is self._ranks
        self._show_ranks(self._grid if self._wants_grid else self._ranks)
        self.fit()

    def _grid_is_better(self, most: int) -> bool:
        """`most`: the lines that the ranks get at most."""
        if self._wants_grid is not None:
            return self._wants_grid
        return self._ranks.count > GRID_FROM and self._ranks.rows_least > most

    def _show_ranks(self, panel: RankTable | RankGrid) -> None:
        """Show this one, with the selection, the filter, the focus and the size of the other."""
        before, self.ranks = self.ranks, panel
        if before is panel:
            return
        screen = self.screen
        focused, zoomed = before.has_focus, screen.maximized is before
        panel.remove_class("-hidden", "-absent")
        panel.styles.height = before.styles.height
        panel.selected = before.selected
        panel.set_filter(before.filter)
        if focused:
            panel.focus()
        before.add_class("-absent")
        if zoomed and isinstance(screen, LiveScreen):
            screen.minimize()
            screen.zoom(panel)

    def _lines(
        self, heights: Heights, ended: bool, table: Widget, middle: Widget, summary: Widget, events: Widget
    ) -> Iterable[tuple[Widget, int]]:
        """The height of each panel. The summary stands where the plots, the memory and part of the events were."""
        if not ended:
            return ((table, heights.table), (middle, heights.middle), (events, heights.events))
        room = heights.middle + heights.events + heights.host_line + heights.legend
        shown = max(1, min(room - 3, max(heights.middle, room * 3 // 4)))
        return ((table, heights.table), (summary, shown), (events, room - shown))

    @on(RankPanel.Selected)
    def _rank_selected(self, message: RankPanel.Selected) -> None:
        memory = self._memory
        memory.rank = message.rank
        memory.redraw()
