"""What the screens behind the number keys have in common."""

from __future__ import annotations

from typing import ClassVar

from textual.containers import Vertical
from textual.message import Message
from textual.widget import Widget

from zerotop.tui.view import View


class Page(Vertical):
    """`KEY` opens it. A page fills the place between the header and the footer, or half of it in a wide terminal."""

    KEY: ClassVar[str]
    NAME: ClassVar[str]
    COMPANION: ClassVar[str]
    """The key of the page that a wide terminal shows beside it."""
    view: View | None = None

    class Ready(Message):
        """The page has been mounted with its panels."""

    def on_mount(self) -> None:
        self.post_message(self.Ready())

    def show_view(self, view: View) -> None:
        """Called at every tick before the panels are drawn."""
        self.view = view

    def fit(self) -> None:
        """Share the height among the panels. Called when the size or what the panels want has changed."""

    def first_focus(self) -> Widget | None:
        """The panel that has the focus when the page is opened."""
        return next((child for child in self.query("*") if child.can_focus and child.display), None)

    def other_role(self) -> str | None:
        """Of the page of data: the data that `d` shows next."""
        return None

    def next_role(self) -> None:
        """Of the page of data: switch to them."""

    def on_resize(self) -> None:
        if self.is_mounted:
            self.fit()
