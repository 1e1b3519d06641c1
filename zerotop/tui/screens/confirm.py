"""A question before something that cannot be undone: what will happen, what is lost, and the one key that does it."""

from __future__ import annotations

import math
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from zerotop.tui.text import plain


class ConfirmScreen(ModalScreen[bool]):
    """True only for `y`. Enter, Space or other keys do nothing; Esc and `n` go back.

    A key typed before the question was shown is not an answer to it: the app asks `takes` and drops it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str, lines: tuple[str, ...], yes: str, *, dangerous: bool) -> None:
        super().__init__()
        self.question = question
        self.lines = lines
        self.yes = yes
        self.dangerous = dangerous
        self._there_s = math.inf

    def on_mount(self, event: events.Mount) -> None:
        self._there_s = event.time

    def takes(self, event: events.Event) -> bool:
        """Whether the key was typed after the question was shown."""
        return event.time >= self._there_s

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog" + (" dangerous" if self.dangerous else "")) as dialog:
            dialog.border_title = plain(("▲ " if self.dangerous else "") + self.question)
            for line in self.lines:
                yield Static(plain(line))
            yield Static(
                Content.from_markup("[b $accent]y[/] $yes      [b $accent]n[/] go back", yes=self.yes),
                classes="choices",
            )

    def action_answer(self, answer: bool) -> None:
        """Close with this answer."""
        self.dismiss(answer)
