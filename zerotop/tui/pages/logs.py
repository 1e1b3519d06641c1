"""6: what the run has said, and what it was told to do."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.widget import Widget

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.audit import CommandAudit
from zerotop.tui.panels.log import LogPanel

AUDIT_LEAST, AUDIT_MOST = 4, 12


class LogPage(Page):
    """The log, and the commands below it."""

    KEY: ClassVar[str] = "6"
    NAME: ClassVar[str] = "Logs"
    COMPANION: ClassVar[str] = "1"

    def __init__(self) -> None:
        super().__init__(id="logs")

    def compose(self) -> ComposeResult:
        yield LogPanel(id="log")
        yield CommandAudit(id="audit")

    def first_focus(self) -> Widget | None:
        return self.query_one(LogPanel)

    def fit(self) -> None:
        """The commands get a quarter of the page."""
        if not self._nodes or not self.size.height or self.has_class("-resized"):
            return
        audit = self.query_one(CommandAudit)
        height = max(AUDIT_LEAST, min(AUDIT_MOST, self.size.height // 4))
        audit.styles.height = None if self.screen.maximized is audit else height
