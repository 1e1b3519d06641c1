"""8: what the run is trained and evaluated on."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from zerotop.state.material import ROLES
from zerotop.tui.pages.base import Page
from zerotop.tui.panels.data import DataFacts, ExamplePanel, LengthPanel


class DataPage(Page):
    """The data reports of the run: figures, lengths, and examples, of the training or the evaluation data."""

    KEY: ClassVar[str] = "8"
    NAME: ClassVar[str] = "Data"
    COMPANION: ClassVar[str] = "5"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.back", "Back", show=True),
        Binding("left_square_bracket", "other(-1)", "Previous", show=True),
        Binding("right_square_bracket", "other(1)", "Next", show=True),
    ]

    def __init__(self) -> None:
        super().__init__(id="data-page")
        self.role = "train"

    def compose(self) -> ComposeResult:
        with Horizontal(id="report"):
            yield DataFacts(id="data-facts")
            yield LengthPanel(id="lengths")
        yield ExamplePanel(id="example")

    def first_focus(self) -> Widget | None:
        return self.query_one(ExamplePanel)

    def other_role(self) -> str | None:
        """The role that the key shows next; None if the run has reported no other."""
        other = next(role for role in ROLES if role != self.role)
        return other if self.view is not None and other in self.view.state.data else None

    def next_role(self) -> None:
        """Switch between training and evaluation data."""
        self._switch(self.other_role() or "train", 0)

    def action_other(self, by: int) -> None:
        """Switch to another example."""
        report = self.view.state.data.get(self.role) if self.view is not None else None
        if report is not None and report.examples:
            self._switch(self.role, (self.query_one(ExamplePanel).number + by) % len(report.examples))

    def _switch(self, role: str, number: int) -> None:
        self.role = role
        example = self.query_one(ExamplePanel)
        example.number = number
        for panel in (example, self.query_one(DataFacts), self.query_one(LengthPanel)):
            panel.role = role
            panel.redraw()
