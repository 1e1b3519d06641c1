"""3: what every rank did when."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.lanes import LanePanel


class TimelinePage(Page):
    """The lanes of all ranks."""

    KEY: ClassVar[str] = "3"
    NAME: ClassVar[str] = "Timeline"
    COMPANION: ClassVar[str] = "4"

    def __init__(self) -> None:
        super().__init__(id="timeline-page")

    def compose(self) -> ComposeResult:
        yield LanePanel(id="lanes")
