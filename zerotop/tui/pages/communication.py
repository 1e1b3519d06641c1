"""4: what communication costs, and which rank the others wait for."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.widget import Widget

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.operations import OperationTable
from zerotop.tui.panels.skew import SkewMap


class CommunicationPage(Page):
    """The kinds of collectives, and the skew of the ranks step by step."""

    KEY: ClassVar[str] = "4"
    NAME: ClassVar[str] = "Communication"
    COMPANION: ClassVar[str] = "3"

    def __init__(self) -> None:
        super().__init__(id="communication")

    def compose(self) -> ComposeResult:
        yield OperationTable(id="operations")
        yield SkewMap(id="skew")

    def first_focus(self) -> Widget | None:
        return self.query_one(SkewMap)

    def fit(self) -> None:
        """The table is as high as its lines while the map keeps half of the page."""
        if not self._nodes or not self.size.height or self.has_class("-resized"):
            return
        table, skew = self.query_one(OperationTable), self.query_one(SkewMap)
        wanted = table.virtual_size.height + table.gutter.height
        height = max(4, min(wanted, self.size.height // 2))
        table.styles.height = None if self.screen.maximized is table else height
        skew.styles.height = None if self.screen.maximized is skew else max(4, self.size.height - height)
