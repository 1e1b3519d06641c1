"""2: where the memory is, how high it was, and what will need more of it."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.panels.memory_bars import MemoryBars
from zerotop.tui.panels.peaks import PeakPanel, PlanPanel
from zerotop.tui.panels.rank_panel import RankPanel

DETAILS_LEAST = 9
"""Lines of the panels on one rank."""


class MemoryPage(Page):
    """Bars of all hosts and ranks; below them one rank by category, by phase, and beside its plan."""

    KEY: ClassVar[str] = "2"
    NAME: ClassVar[str] = "Memory"
    COMPANION: ClassVar[str] = "1"

    def __init__(self) -> None:
        super().__init__(id="memory-page")

    def compose(self) -> ComposeResult:
        yield MemoryBars(id="bars")
        with Horizontal(id="memory-details"):
            yield MemoryPanel("", id="memory")
            yield PeakPanel(id="peaks")
            yield PlanPanel(id="plan")

    def first_focus(self) -> Widget | None:
        return self.query_one(MemoryBars)

    def fit(self) -> None:
        """The bars are as high as their lines while the details keep theirs."""
        if not self._nodes or not self.size.height or self.has_class("-resized"):
            return
        bars = self.query_one(MemoryBars)
        height = max(4, min(bars.rows_wanted, self.size.height - DETAILS_LEAST))
        bars.styles.height = None if self.screen.maximized is bars else height

    @on(RankPanel.Selected)
    def _rank_selected(self, message: RankPanel.Selected) -> None:
        message.stop()
        for panel in (self.query_one(MemoryPanel), self.query_one(PeakPanel), self.query_one(PlanPanel)):
            panel.rank = message.rank
            panel.redraw()
