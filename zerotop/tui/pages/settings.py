"""7: the settings of the run."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.settings import FixedSettings, SettingTable


class SettingsPage(Page):
    """What can be changed now, and what cannot."""

    KEY: ClassVar[str] = "7"
    NAME: ClassVar[str] = "Settings"
    COMPANION: ClassVar[str] = "1"

    def __init__(self) -> None:
        super().__init__(id="settings-page")

    def compose(self) -> ComposeResult:
        yield SettingTable(id="settings")
        yield FixedSettings(id="fixed")

    def fit(self) -> None:
        """The table is as high as its lines."""
        if not self._nodes or not self.size.height or self.has_class("-resized"):
            return
        table = self.query_one(SettingTable)
        height = max(5, min(table.rows_wanted, self.size.height - 3))
        table.styles.height = None if self.screen.maximized is table else height
