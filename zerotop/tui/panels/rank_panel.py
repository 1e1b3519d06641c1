"""The base of panels in which a rank is selected: how it is shown, clicked on and opened."""

from __future__ import annotations

from textual import events
from textual.message import Message

from zerotop.tui.widgets.lines import ScrollPanel


class RankPanel(ScrollPanel):
    """A panel with a selected rank. Enter, or a second click on it, opens it."""

    class Selected(Message):
        """The selection moved to another rank."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            super().__init__()

    class Opened(Message):
        """The user opened a rank."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            super().__init__()

    selected = 0

    def rank_at(self, column: int, line: int) -> int | None:
        """The rank at this place of the content as it is scrolled now; None if there is none."""
        raise NotImplementedError

    def select_rank(self, number: int) -> None:
        """Select a rank and scroll it into view."""
        raise NotImplementedError

    def scroll_line_into_view(self, line: int, visible: int) -> None:
        """Scroll as little as is needed for `line` to be among the `visible` lines."""
        top = self.scroll_offset.y
        if visible > 0 and not top <= line < top + visible:
            target = line if line < top else line - visible + 1
            self.scroll_to(y=target, animate=False, immediate=True, force=True)

    def tell_selected(self) -> None:
        """Draw the new selection, and tell the page."""
        self.redraw()
        self.post_message(self.Selected(self.selected))

    def action_open(self) -> None:
        """Open the selected rank."""
        self.post_message(self.Opened(self.selected))

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset_capture(self)
        number = self.rank_at(offset.x, offset.y)
        if number is None:
            return
        if number == self.selected and event.chain > 1:
            self.action_open()
        else:
            self.select_rank(number)

    def on_focus(self) -> None:
        self.redraw()

    def on_blur(self) -> None:
        self.redraw()
