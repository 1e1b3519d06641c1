"""The run on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.widget import Widget
from textual.widgets import Input

from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.header import Header
from zerotop.tui.panels.host import ROWS_LEAST, HostPanel
from zerotop.tui.panels.memory import Legend, MemoryPanel
from zerotop.tui.panels.plots import LEARNING, SPEED, PlotPanel
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.panels.strip import CommandStrip
from zerotop.tui.panels.verdict import VerdictLine
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.keybar import KeyBar

ROOMY = 32
"""From this height on, a line is reserved for the commands."""
TALL = 44
"""From this height on, the verdict has two lines: one more for the rest of its sentence, or for what to do."""
EVENTS_LEAST = 6
RANKS_FIRST = 8
"""This many ranks are visible before plots and events get more than their minimum."""


@dataclass(frozen=True)
class Heights:
    """Lines of each part between header and footer; 0: not shown. Together they are never more than there are."""

    table: int
    legend: int
    middle: int
    host_line: int
    events: int
    low: bool = False


def share_out(room: int, narrow: bool, wanted: int, title_lines: int, side: int) -> Heights:
    """How `room` lines are shared. The rank table is as high as its ranks (`wanted`) while the rest stays readable;
    then the memory panel is as high as its categories, and the host gets what is left of the `side`, at least its
    first lines. `title_lines` are those of the table that show no rank."""
    if narrow:
        extra = 1 if room >= 14 else 0  # the legend and the host, a line each
        table = max(min(room, 4), min(wanted, room - 2 * extra - 8))
        rest = room - 2 * extra - table
        middle = min(8, max(5, rest // 2)) if rest >= 8 else 0
        return Heights(table, extra, middle, extra, rest - middle)
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


class FilterField(Input):
    """The input for the filter of the events."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Keep this filter", show=True),
        Binding("escape", "app.back", "Clear it", show=True),
    ]


class MainScreen(LiveScreen):
    """The run on one screen."""

    PANELS: ClassVar[dict[str, str]] = {
        name: name for name in ("ranks", "learning", "speed", "memory", "host", "events")
    }
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "app.back", "Back", show=False)]

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.palette = palette
        self._fitted: tuple[Heights, Widget | None] | None = None

    def compose(self) -> ComposeResult:
        yield VerdictLine(id="verdict")
        yield Header(id="header")
        yield RankTable(id="ranks")
        yield Legend(id="legend")
        with Horizontal(id="middle"):
            yield PlotPanel(2, LEARNING, id="learning")
            yield PlotPanel(3, SPEED, id="speed")
            with Vertical(id="side"):
                yield MemoryPanel(id="memory")
                yield HostPanel(id="host")
        yield HostPanel(id="host-line")
        yield EventPanel(id="events")
        yield FilterField(placeholder="part of a line, a severity, rank 1 …", id="filter")
        yield CommandStrip(id="strip")
        yield KeyBar(self.palette)

    def on_mount(self) -> None:
        self.query_one("#host-line").can_focus = False
        self.query_one("#filter").display = False
        self.query_one(RankTable).focus()

    def show_view(self, view: View) -> None:
        super().show_view(view)
        self.fit_panels()

    def on_resize(self) -> None:
        self.fit_panels()

    def fit_panels(self) -> None:
        """Give each part its height. A zoomed panel has none of its own: that would limit it."""
        try:
            table, middle = self.query_one(RankTable), self.query_one("#middle")
            events, memory = self.query_one(EventPanel), self.query_one(MemoryPanel)
            verdict, strip = self.query_one(VerdictLine), self.query_one(CommandStrip)
            host = self.query_one("#host", HostPanel)
            field = self.query_one(FilterField)
        except NoMatches:
            return  # a last tick or resize, while the app takes its panels down one by one
        height, narrow = self.size.height, self.has_class("-narrow")
        roomy = not narrow and height >= ROOMY
        verdict.reserve(2 if height >= TALL else 1)
        strip.reserve(int(roomy))
        bands = verdict.lines_taken + strip.lines_taken
        room = height - 3 - self.lines_below - bands - int(field.display)  # 3: header and footer
        side = memory.rows_wanted + ROWS_LEAST + host.gutter.height
        heights = share_out(room, narrow, table.rows_wanted, 1 + table.gutter.height, side)
        if (heights, self.maximized) == self._fitted:
            return
        self._fitted = (heights, self.maximized)
        self.set_class(heights.low, "-low")
        for part, lines in (("legend", heights.legend), ("middle", heights.middle), ("host-line", heights.host_line)):
            self.set_class(not lines, f"-no-{part}")
        self.set_class(heights.events <= 0, "-no-events")
        for panel, lines in ((table, heights.table), (middle, heights.middle), (events, heights.events)):
            panel.styles.height = None if self.maximized is panel else max(lines, 1)

    # ---- panels ----------------------------------------------------------------------------------------------------
    @on(RankTable.Selected)
    def _rank_selected(self, message: RankTable.Selected) -> None:
        memory = self.query_one(MemoryPanel)
        memory.rank = message.rank
        memory.redraw()

    # ---- the filter of the events ----------------------------------------------------------------------------------
    def open_filter(self) -> None:
        """Show the filter field."""
        field = self.query_one(FilterField)
        if self.maximized is not None and not isinstance(self.maximized, EventPanel):
            self.unzoom()  # what is being filtered should be in sight
        field.display = True
        self.set_focus(field)
        self.fit_panels()

    def close_filter(self) -> bool:
        """Esc: True if there was a filter or its field to remove."""
        field, panel = self.query_one(FilterField), self.query_one(EventPanel)
        if not field.display and not panel.filter:
            return False
        field.value = ""
        field.display = False
        panel.set_filter("")
        self.set_focus(panel)
        self.fit_panels()
        return True

    @on(Input.Changed, "#filter")
    def _filter_changed(self, message: Input.Changed) -> None:
        self.query_one(EventPanel).set_filter(message.value)

    @on(Input.Submitted, "#filter")
    def _filter_kept(self) -> None:
        self.query_one(FilterField).display = False
        self.set_focus(self.query_one(EventPanel))
        self.fit_panels()
