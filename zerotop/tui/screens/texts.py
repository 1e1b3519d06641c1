"""What the model writes for the fixed prompts, evaluation by evaluation."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal

from zerotop.tui.panels.header import Header
from zerotop.tui.panels.texts import EvaluationList, TextPanel
from zerotop.tui.panels.verdict import VerdictLine
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.keybar import KeyBar


class TextScreen(LiveScreen):
    """The list of evaluations, and the generated texts of one of them. It follows the newest until one is chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.back", "Back", show=True),
        Binding("left_square_bracket", "other(-1)", "Earlier", show=True),
        Binding("right_square_bracket", "other(1)", "Later", show=True),
    ]

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.palette = palette

    def compose(self) -> ComposeResult:
        yield VerdictLine(id="verdict")
        yield Header(id="header")
        with Horizontal(id="written"):
            yield EvaluationList(id="evaluations")
            yield TextPanel(id="texts")
        yield KeyBar(self.palette)

    def on_mount(self) -> None:
        self.query_one(TextPanel).focus()

    def show_view(self, view: View) -> None:
        shown = self.query_one(TextPanel).evaluation(view.state)
        self.query_one(EvaluationList).shown_step = shown.step if shown is not None else None
        super().show_view(view)

    def action_other(self, by: int) -> None:
        """Switch to an earlier or a later evaluation; the last one follows the newest again."""
        panel = self.query_one(TextPanel)
        shown = panel.evaluation(self.view.state) if self.view is not None else None
        if self.view is None or shown is None:
            return
        there = self.view.state.evaluations.with_texts
        at = max(0, min(len(there) - 1, next(i for i, one in enumerate(there) if one is shown) + by))
        panel.step = None if at == len(there) - 1 else there[at].step
        self.refresh_panels()
