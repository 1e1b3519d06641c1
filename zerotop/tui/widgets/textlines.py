"""A scrolling panel for text that seldom changes: all its lines are made at once, and again only for something new."""

from __future__ import annotations

from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row, ScrollPanel


class TextLines(ScrollPanel):
    """Subclasses say by `subject` what they show, and make its lines in `make_rows`. A new subject begins at its top;
    a new width keeps the place."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")
        self._rows: list[Row] = []
        self._key: tuple[object, ...] | None = None

    def subject(self, view: View) -> object:
        """What is shown, as something that compares equal while it is the same."""
        raise NotImplementedError

    def details(self, view: View) -> object:
        """What else the lines depend on. A change of it makes them again, in the same place."""
        return None

    def make_rows(self, view: View, width: int) -> list[Row]:
        """All lines."""
        raise NotImplementedError

    def inputs(self, view: View) -> object:
        return super().inputs(view), self.subject(view), self.details(view), self.app.no_color

    def accept(self, view: View) -> None:
        width = self.scrollable_content_region.width or 80
        key = (self.subject(view), self.details(view), view.palette.name, self.app.no_color, width)
        if key == self._key:
            return
        other = self._key is None or key[0] != self._key[0]
        self._key = key
        self._rows = self.make_rows(view, width)
        self.have_lines(len(self._rows))
        if other:
            self.scroll_home(animate=False, immediate=True, force=True)

    def on_resize(self) -> None:
        if self.view is not None:
            self.accept(self.view)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        first = self.scroll_offset.y
        return self._rows[first : first + height]
