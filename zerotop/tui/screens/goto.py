"""Where a replay is to go: a moment, judged while it is typed."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from zerotop.format import clock_text, duration_text
from zerotop.recording.moments import Extent, MomentError, parse_moment
from zerotop.tui.text import plain


class GoToScreen(ModalScreen[float | None]):
    """Returns the wall time to show, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self.extent = extent

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = plain("go to")
            yield Static(plain("1200 a step · 14:03 a time of day · 5m from the beginning · -10m before the end · 50%"))
            yield Input(id="value", placeholder="a moment of the recording")
            yield Static(id="verdict-value")
            yield Static(Content.from_markup("[b $accent]Enter[/] go   [b $accent]Esc[/] go back"), classes="choices")

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    @on(Input.Changed)
    def _changed(self, message: Input.Changed) -> None:
        self._judge(message.value)

    @on(Input.Submitted)
    def _go(self, message: Input.Submitted) -> None:
        wall_s = self._judge(message.value)
        if wall_s is not None:
            self.dismiss(wall_s)

    def _judge(self, text: str) -> float | None:
        verdict = self.query_one("#verdict-value", Static)
        verdict.remove_class("good", "bad")
        if not text.strip():
            verdict.update("")
            return None
        try:
            wall_s = parse_moment(text, self.extent)
        except MomentError as error:
            verdict.update(plain(f"✖ {error}"))
            verdict.add_class("bad")
            return None
        gone = duration_text(wall_s - self.extent.begin_s)
        verdict.update(plain(f"✔ {clock_text(wall_s)}, {gone} after the beginning"))
        verdict.add_class("good")
        return wall_s

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss(None)
