"""Line-by-line drawing: a row builder, and a widget that repaints only the lines that changed.

Over SSH every repainted cell costs, and most of a screen stays the same from one tick to the next. So a panel makes all
its visible lines (cheap), compares them with the previous ones (cheaper), and repaints only those that differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from zerotop.clean import clean_line
from zerotop.tui.text import plain

if TYPE_CHECKING:
    from zerotop.tui.view import View

PLAIN = Style()


class Row:
    """Builds one line from pieces of text, measured in cells."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.width = 0

    def add(self, text: str, style: Style = PLAIN) -> Row:
        """Append text."""
        if text:
            text = clean_line(text)  # nothing that a rank says may reach the terminal as a command
            self.segments.append(Segment(text, style))
            self.width += cell_len(text)
        return self

    def extend(self, segments: Iterable[Segment]) -> Row:
        """Append segments."""
        for segment in segments:
            self.add(segment.text, segment.style or PLAIN)
        return self

    def cell(self, text: str, width: int, style: Style = PLAIN, *, right: bool = False) -> Row:
        """Append `text` in exactly `width` cells: padded, or cut with an ellipsis."""
        return self.add(fit(text, width, right=right), style)

    def gap(self, width: int = 1) -> Row:
        """Append blanks."""
        return self.add(" " * width)

    def to(self, column: int) -> Row:
        """Append blanks up to `column`."""
        return self.gap(max(0, column - self.width))

    def strip(self, width: int, style: Style = PLAIN) -> Strip:
        """The line in exactly `width` cells, with `style` under everything."""
        line = Strip(self.segments, self.width).adjust_cell_length(width)
        return line.apply_style(style) if style else line


def changed_cells(old: Strip, new: Strip) -> tuple[int, int]:
    """(first, end) of the cells in which two lines of one length differ; a part of the line at least as large."""
    before, after = list(old), list(new)
    start = _alike(before, after, backwards=False)
    end = new.cell_length - _alike(before[::-1], after[::-1], backwards=True)
    return (start, end) if start < end else (0, new.cell_length)


def _alike(before: list[Segment], after: list[Segment], backwards: bool) -> int:
    """The cells at one end in which both are the same. Only texts of single cells are compared inside a segment."""
    cells = 0
    for one, other in zip(before, after, strict=False):
        if one == other:
            cells += one.cell_length
            continue
        simple = one.cell_length == len(one.text) and other.cell_length == len(other.text)
        if simple and one.style == other.style:
            texts = (one.text[::-1], other.text[::-1]) if backwards else (one.text, other.text)
            pairs = enumerate(zip(*texts, strict=False))
            shorter = min(len(text) for text in texts)
            cells += next((at for at, (a, b) in pairs if a != b), shorter)
        break
    return cells


def fit(text: str, width: int, *, right: bool = False) -> str:
    """`text` in exactly `width` cells: padded, or cut with an ellipsis."""
    size = cell_len(text)
    if width <= 0:
        return ""
    if size > width:
        return set_cell_size(text, width - 1) + "…"
    return " " * (width - size) + text if right else text + " " * (width - size)


class _Drawn(Widget):
    """Common to fixed and scrolling panels: the view they show, and the lines they showed last."""

    view: View | None = None
    _shown: list[Strip] | None = None
    _title = ""

    def entitle(self, title: str) -> None:
        """Set the title of the border, without markup."""
        if title != self._title:
            self._title = title
            self.border_title = plain(title)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        """The visible lines, at most `height` of them, each at most `width` cells. Must not keep a reference to the
        view."""
        raise NotImplementedError

    def accept(self, view: View) -> None:
        """Take the tick's view; subclasses update titles and virtual sizes here, before the lines are drawn."""
        self.view = view

    def show(self, view: View) -> None:
        """Draw `view` and repaint the lines that differ from those on screen. Hidden panels only keep the view."""
        self.accept(view)
        before = self._shown
        if not self.display or not self.size.width or not self.size.height:
            self._shown = None
            return
        after = self._make()
        if before is None or len(before) != len(after):
            self.refresh()
        else:
            for y, (old, new) in enumerate(zip(before, after, strict=True)):
                if old != new:
                    start, end = changed_cells(old, new)
                    self.refresh(Region(start, y, max(1, end - start), 1))

    def redraw(self) -> None:
        """Draw the same view again: selection, scrolling or size has changed."""
        if self.view is not None:
            self.show(self.view)

    def _make(self) -> list[Strip]:
        width, height = self.scrollable_content_region.size if isinstance(self, ScrollView) else self.size
        rows = self.draw(self.view, width, height) if self.view is not None else []
        self._shown = [row.strip(width) for row in rows[:height]]
        return self._shown

    def render_line(self, y: int) -> Strip:
        lines = self._shown if self._shown is not None else self._make()
        base = self.rich_style
        width = self.size.width
        if y >= len(lines):
            return Strip.blank(width, base)
        return lines[y].adjust_cell_length(width).apply_style(base)

    def on_resize(self) -> None:
        self._shown = None
        self.refresh()


class Panel(_Drawn):
    """A panel of fixed content: what does not fit is not shown."""

    ALLOW_MAXIMIZE = True

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self.natural_height(width)

    def natural_height(self, width: int) -> int:
        """The height for the style `height: auto`."""
        return 1


class Band(Panel):
    """Lines that come and go. Where there is room some are reserved, so that what is below stays in place."""

    ALLOW_MAXIMIZE = False
    lines_wanted = 0
    lines_reserved = 0

    @property
    def lines_taken(self) -> int:
        """The height of the band."""
        return max(self.lines_wanted, self.lines_reserved)

    def reserve(self, lines: int) -> None:
        """Keep so many lines free even if there is less to show."""
        if lines != self.lines_reserved:
            self.lines_reserved = lines
            self.take(self.lines_wanted)

    def take(self, lines: int) -> None:
        """Set the number of lines."""
        self.lines_wanted = lines
        self._shown = None
        taken = self.lines_taken
        height = self.styles.height
        if self.display != bool(taken) or height is None or height.value != taken:
            self.styles.height = self.lines_taken
            self.display = bool(self.lines_taken)

    def natural_height(self, width: int) -> int:
        return self.lines_taken


class ScrollPanel(ScrollView, _Drawn, can_focus=True):  # the first base gives the default styles
    """A panel whose lines scroll. `draw` makes only the visible lines, from `self.scroll_offset.y` on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "by(-1)", "Up", show=False),
        Binding("down", "by(1)", "Down", show=False),
        Binding("pageup", "by(-10)", "Ten up", show=False),
        Binding("pagedown", "by(10)", "Ten down", show=False),
        Binding("home", "by(-100000)", "Top", show=False),
        Binding("end", "by(100000)", "Bottom", show=False),
    ]

    def action_by(self, lines: int) -> None:
        """Scroll at once: an animation would repaint the panel many times over a slow line."""
        self.scroll_to(y=self.scroll_offset.y + lines, animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if round(old_value) != round(new_value):
            self._shown = None
            self.refresh()
