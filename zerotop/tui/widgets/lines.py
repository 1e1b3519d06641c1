"""Line-by-line drawing: a row builder, and a widget that repaints only the lines that changed.

Over SSH every repainted cell costs, and most of a screen stays the same from one tick to the next. So a panel is drawn
only if something that it reads has changed (`inputs`). Then it makes all its visible lines, compares them with the
previous ones, and repaints only the cells that differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest
from time import monotonic
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
from zerotop.tui.keys import PAGE_NAMES
from zerotop.tui.text import plain

if TYPE_CHECKING:
    from zerotop.tui.view import View

PLAIN = Style()
RARE = ("status", "hello", "goodbye")
"""Kinds of messages that may change every panel."""
FLICKER_S = 0.5
"""Phases change many times a second. Nobody can follow more of it, and drawing it takes most of a tick."""
TITLE_MARGIN = 4
"""Cells of a border's corner and the blanks around its title."""


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
            self.width += len(text) if text.isascii() else cell_len(text)
        return self

    def extend(self, segments: Iterable[Segment], width: int | None = None) -> Row:
        """Append segments. With their `width` they are taken as they are: they must be of our own making."""
        if width is not None:
            self.segments += segments
            self.width += width
            return self
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
        if self.width < width:  # a Strip is dear: one is made, and not another one to fill it up
            line = Strip([*self.segments, Segment(" " * (width - self.width))], width)
        else:
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
    size = len(text) if text.isascii() else cell_len(text)
    if width <= 0:
        return ""
    if size > width:
        return set_cell_size(text, width - 1) + "…"
    return " " * (width - size) + text if right else text + " " * (width - size)


class _Drawn(Widget):
    """Common to fixed and scrolling panels: the view they show, and the lines they showed last."""

    READS: ClassVar[tuple[str, ...] | None] = None
    """Kinds of messages that the title and the lines depend on, beside those of RARE; None: draw at every tick."""
    FLICKERS: ClassVar[tuple[str, ...]] = ()
    """More such kinds, which change many times a second: what they change is drawn at most every FLICKER_S, or with
    something else."""
    _drawn_s = -math.inf
    _steady: object = None
    _flickered: object = None
    """When it was drawn last, and the revisions of both kinds then."""
    view: View | None = None
    _last: list[Row] = []  # noqa: RUF012 (replaced, never changed)
    """What `draw` returned last; `_shown` are its lines."""
    _shown: list[Strip] | None = None
    _read: tuple[object, ...] | None = None
    """What the panel has read for its last lines; None if they are to be drawn again in any case."""
    _base = PLAIN
    _behind = False
    """Whether the panel has only kept the newest view, because it was out of sight."""
    _title = ""

    def entitle(self, title: str) -> None:
        """Set the title of the border, without markup."""
        if title == self._title:
            return
        before, self._title = self._title, title
        # Setting `border_title` would repaint the whole panel, and the titles of plots change at every step.
        self._border_title = plain(title)
        top = self.gutter.top
        if top:
            pairs = enumerate(zip(before, title, strict=False))
            same = cell_len(title[: next((at for at, (old, new) in pairs if old != new), len(before))])
            width = max(cell_len(before), cell_len(title)) + TITLE_MARGIN - same
            line = Region(0, 0, self.outer_size.width, 1).intersection(Region(same, 0, width, 1))
            self.refresh(line.translate((-self.gutter.left, -top)))

    @property
    def opens(self) -> str:
        """The number key that the title names, of the screen that Enter opens; "" if it names none."""
        number, _, rest = self._title.partition(" ")
        return number if rest and number in PAGE_NAMES else ""

    def inputs(self, view: View) -> object:
        """What the title and the lines depend on, as a value that compares equal while they stay the same; None: draw
        at every tick. It is the revision of what the panel READS; a panel that shows more, such as the time of day or
        options of its own, adds that. The size, the palette, the focus, and whether the data is old or frozen count
        for every panel."""
        if self.READS is None:
            return None
        steady = view.state.revision((*self.READS, *RARE))
        if not self.FLICKERS:
            return steady
        now = monotonic()
        if steady != self._steady or now - self._drawn_s >= FLICKER_S:
            flickers = view.state.revision(self.FLICKERS)
            if (steady, flickers) != (self._steady, self._flickered):
                self._steady, self._flickered, self._drawn_s = steady, flickers, now
        return self._steady, self._flickered

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        """The visible lines, at most `height` of them, each at most `width` cells. Must not keep a reference to the
        view."""
        raise NotImplementedError

    def notice(self, view: View) -> None:
        """Take from each tick's view what matters even while the panel is out of sight."""

    def accept(self, view: View) -> None:
        """Update titles and virtual sizes, before the lines are drawn."""

    def show(self, view: View, in_sight: bool = True) -> None:
        """Draw `view` if something in it that the panel reads has changed, and repaint the cells that differ from those
        on screen. A panel out of sight only keeps the view."""
        self.view = view
        if not self.is_attached:  # the page or the screen is being taken down
            return
        self.notice(view)
        if not (in_sight and self.outer_size):  # `size` would look up where the panel stands
            self._behind = True
            self._read = self._shown = None
            return
        self._behind = False
        inputs = self.inputs(view)
        read = (
            self.outer_size,
            self.show_vertical_scrollbar,
            view.palette,
            view.stale,
            view.frozen,
            view.ended,
            self.has_focus,
            inputs,
        )
        if inputs is not None and read == self._read:
            return
        self._read = read
        self.accept(view)
        if self.show_vertical_scrollbar != read[1]:  # it has come or gone, and the lines have another width
            self._read = (read[0], self.show_vertical_scrollbar, *read[2:])
            self.accept(view)
        before = self._shown
        after = self._make()
        if before is None or len(before) != len(after):
            self.refresh()
            return
        changed = []
        for y, (old, new) in enumerate(zip(before, after, strict=True)):
            if old is not new:
                start, end = changed_cells(old, new)
                changed.append(Region(start, y, max(1, end - start), 1))
        if changed:
            self.refresh(*changed)

    def redraw(self) -> None:
        """Draw the same view again: selection, scrolling or size has changed."""
        self.expire()
        if self.view is not None:
            self.show(self.view, self.display)

    def expire(self) -> None:
        """At the next view the lines are drawn again, whatever has changed."""
        self._read = None

    def _make(self) -> list[Strip]:
        width, height = self.scrollable_content_region.size if isinstance(self, ScrollView) else self.size
        before, lines = self._last, self._shown or []
        rows = self.draw(self.view, width, height)[:height] if self.view is not None else []
        self._last = rows
        self._shown = [
            old if old is not None and old.cell_length == width and row.segments == last.segments else row.strip(width)
            for row, last, old in zip_longest(rows, before, lines)
            if row is not None
        ]
        return self._shown

    def render_lines(self, crop: Region) -> list[Strip]:
        self._base = self.visual_style.rich_style  # `rich_style` is put together from all ancestors for every line
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        lines = self._shown if self._shown is not None else self._make()
        if y >= len(lines):
            return Strip.blank(self.size.width, self._base)
        return lines[y].apply_style(self._base)

    def on_resize(self) -> None:
        self._read = self._shown = None
        self.on_show()
        self.refresh()

    def on_show(self) -> None:
        """The panel comes in sight."""
        if self._behind:
            self.redraw()


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
        self._read = self._shown = None
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
        Binding("up,k", "by(-1)", "Up", show=False),
        Binding("down,j", "by(1)", "Down", show=False),
        Binding("pageup", "by(-10)", "Ten up", show=False),
        Binding("pagedown", "by(10)", "Ten down", show=False),
        Binding("home", "by(-100000)", "Top", show=False),
        Binding("end", "by(100000)", "Bottom", show=False),
    ]

    def have_lines(self, count: int) -> None:
        """Set the number of lines that can be scrolled through."""
        size = Size(0, count)
        if size == self.virtual_size:
            return
        higher = count > self.scrollable_content_region.height
        if self.size and self.show_vertical_scrollbar == higher:
            # Textual would lay out the whole screen, for a log line that was added. Only the scroll bar has changed.
            self.set_reactive(ScrollPanel.virtual_size, size)
            if higher:
                self.vertical_scrollbar.window_virtual_size = count
        else:
            self.virtual_size = size

    def action_by(self, lines: int) -> None:
        """Scroll at once: an animation would repaint the panel many times over a slow line."""
        self.scroll_to(y=self.scroll_offset.y + lines, animate=False, force=True)

    def watch_show_vertical_scrollbar(self) -> None:
        """The lines become narrower or wider. That is mostly found in `accept`, which then runs once more; a scroll bar
        that comes with a new layout has the lines drawn again."""
        self.expire()
        if self.is_mounted:
            if self.show_vertical_scrollbar:  # which heard nothing of scrolling before
                self.vertical_scrollbar.position = self.scroll_y
            self.call_after_refresh(self.redraw)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if round(old_value) != round(new_value):
            self._shown = None
            self.refresh()
