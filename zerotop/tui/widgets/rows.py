"""A widget of lines for screens that show no run's view: `make(width, height)` draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual.strip import Strip
from textual.widget import Widget

from zerotop.tui.widgets.lines import Row

Make = Callable[[int, int], Sequence[Row]]
"""(columns, lines) -> the lines, at most so many."""


class Rows(Widget):
    """Draws the lines of `make`; `redraw` after what it reads has changed."""

    def __init__(self, make: Make, *, id: str) -> None:
        super().__init__(id=id)
        self._make = make
        self._drawn: list[Strip] | None = None

    def redraw(self) -> None:
        """Draw again."""
        self._drawn = None
        self.refresh()

    def on_resize(self) -> None:
        self._drawn = None

    def render_line(self, y: int) -> Strip:
        width, height = self.size
        if self._drawn is None:
            self._drawn = [row.strip(width) for row in self._make(width, height)]
        if y >= len(self._drawn):
            return Strip.blank(width, self.rich_style)
        return self._drawn[y].adjust_cell_length(width).apply_style(self.rich_style)
