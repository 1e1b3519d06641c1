"""The run on one screen."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
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
"""From so many lines on, the verdict and the commands have a line each that nothing else takes."""
EVENTS_LEAST = 6


class FilterField(Input):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Keep this filter", show=True),
        Binding("escape", "app.back", "Clear it", show=True),
    ]


class MainScreen(LiveScreen):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "app.back", "Back", show=False)]

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.palette = palette
        self._middle_height: int | None = None
        self._table_height: int | None = None

    def compose(self) -> ComposeResult:
        yield Header(id="header")
        yield VerdictLine(id="verdict")
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
        """The rank table is as high as its ranks, as long as the rest keeps room to be read; then the memory panel is
        as high as its categories, and the host has what is left of the side, at least its first lines.
        """
        try:
            table, middle = self.query_one(RankTable), self.query_one("#middle")
            bands = (self.query_one(VerdictLine), self.query_one(CommandStrip))
            host, memory = self.query_one("#host", HostPanel), self.query_one(MemoryPanel)
        except NoMatches:
            return  # a last tick or resize, while the app takes its panels down one by one
        height, narrow = self.size.height, self.has_class("-narrow")
        for band in bands:
            band.reserve(not narrow and height >= ROOMY)
        # Header and footer, the lines that come and go, and the least that plots and events can be read in.
        others = 3 + sum(band.lines_taken for band in bands)
        least = 2 + 5 + 3 if narrow else 1 + 12 + EVENTS_LEAST
        most = max(4, height - others - least)
        wanted = min(table.rows_wanted, most)
        room = height - wanted - others
        side = memory.rows_wanted + ROWS_LEAST + host.gutter.height
        low = not narrow and room - EVENTS_LEAST < side
        self.set_class(low, "-low")
        share = None if narrow or low else max(room * 3 // 5, side)
        if share != self._middle_height:
            self._middle_height = share
            middle.styles.height = share  # None: as the style sheet says
        rows = None if self.maximized is table else wanted  # a height of its own would hold a zoomed table down
        if rows != self._table_height:
            self._table_height = rows
            table.styles.height = rows

    # ---- panels ----------------------------------------------------------------------------------------------------
    @on(RankTable.Selected)
    def _rank_selected(self, message: RankTable.Selected) -> None:
        memory = self.query_one(MemoryPanel)
        memory.rank = message.rank
        memory.redraw()

    def focus_panel(self, name: str) -> None:
        """Focus a panel; one that this size has no room for is shown alone."""
        panel = self.query_one(f"#{name}")
        if self.maximized is not None and self.maximized is not panel:
            self.minimize()
        shown = panel.display and all(parent.display for parent in panel.ancestors if hasattr(parent, "display"))
        if not shown:
            self.zoom(panel)
        panel.focus()

    # ---- the filter of the events ----------------------------------------------------------------------------------
    def open_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def close_filter(self) -> bool:
        """Esc: True when there was a filter or its field to take away."""
        field, panel = self.query_one("#filter", Input), self.query_one(EventPanel)
        if not field.display and not panel.filter:
            return False
        field.value = ""
        field.display = False
        panel.set_filter("")
        panel.focus()
        return True

    @on(Input.Changed, "#filter")
    def _filter_changed(self, message: Input.Changed) -> None:
        self.query_one(EventPanel).set_filter(message.value)

    @on(Input.Submitted, "#filter")
    def _filter_kept(self) -> None:
        self.query_one("#filter").display = False
        self.query_one(EventPanel).focus()
