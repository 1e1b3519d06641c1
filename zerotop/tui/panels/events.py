"""Events and log records, newest at the bottom. Follows them unless scrolled up; `/` filters."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from rich.style import Style

from runtime.wire.messages import Event
from zerotop.clean import clean
from zerotop.format import clock_text
from zerotop.state.events import Record, is_progress, record_severity, record_text
from zerotop.tui.abilities import Filterable
from zerotop.tui.text import SEVERITIES, plain
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Row, ScrollPanel

PREFIX = 24
"""Cells before the text: time, glyph, word, rank."""
MOST_CHARACTERS = 4000
"""Limit for one record; the log has the rest."""


@dataclass(frozen=True)
class Line:
    """One screen line of a record; the first carries the record, continuation lines only text."""

    text: str
    severity: str
    record: Record | None


class EventPanel(ScrollPanel, Filterable):
    """The events of the run, or of one rank."""

    READS = ("event", "log", "checkpoint_saved")
    FILTER_HINT = "part of a line, a severity, rank 1 …"

    def __init__(self, *, id: str, title: str = "6 events", rank: int | None = None) -> None:
        super().__init__(id=id)
        self.rank = rank
        """Show only the records of this rank; None: all."""
        self.filter = ""
        self._heading = title
        self._lines: list[Line] = []
        self._wrapped: dict[int, tuple[Record, list[Line]]] = {}
        """id(record) -> its lines for this filter and width, so that a new record does not wrap all others again."""
        self._key: tuple[object, ...] = ()
        self._follow = True

    def inputs(self, view: View) -> object:
        return super().inputs(view), self.options()

    def accept(self, view: View) -> None:
        width = self.scrollable_content_region.width or 80
        events = view.state.events
        # The deque is full after a while, so its length no longer changes: compare the newest record.
        key = (id(events[-1]) if events else 0, len(events), self.options(), width)
        if key == self._key:
            return
        if key[2:] != self._key[2:]:
            self._wrapped = {}
        self._key = key
        at_end = self._follow
        self._lines = self._wrap(view, width)
        self.lines_changed()
        self.have_lines(len(self._lines))
        self.entitle(self.heading())
        if at_end:
            self.scroll_end(animate=False, immediate=True, force=True)
            self._follow = True

    # ---- what a panel with more options changes --------------------------------------------------------------------
    def options(self) -> tuple[object, ...]:
        """What the lines depend on beside the records and the width."""
        return (self.filter, self.rank)

    def heading(self) -> str:
        """The title."""
        return self._heading + (f" · filter “{self.filter}” · {len(self._lines)} lines" if self.filter else "")

    def passes(self, severity: str, text: str) -> bool:
        """Whether a record is shown; `text` has its severity and rank in front."""
        return not self.filter or self.filter.lower() in text.lower()

    @property
    def hides_progress(self) -> bool:
        """Whether the lines with a step's figures are left out; a filter finds them."""
        return not self.filter

    def folded(self, text: str, room: int) -> list[str]:
        """The text in lines of at most `room` cells."""
        return [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, room) or [""]]

    def lines_changed(self) -> None:
        """There are other lines than before."""

    def text_row(self, row: Row, line: Line, style: Style, number: int) -> Row:
        """Add the text of line `number`."""
        return row.add(line.text, style)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        follow = new_value >= self.max_scroll_y
        if follow != self._follow:
            self._follow = follow
            self.border_subtitle = plain("" if follow else "scrolled up · End follows again")

    def on_resize(self) -> None:
        if self.view is not None:
            self.accept(self.view)
        if self._follow:
            self.scroll_end(animate=False, immediate=True, force=True)

    def set_filter(self, text: str) -> None:
        """Show only lines that contain `text`."""
        self.filter = text.strip()
        self._follow = True
        self.redraw()

    def forget(self) -> None:
        """Make the lines again at the next view, for another rank."""
        self._key = ()
        self._wrapped = {}
        self._follow = True

    def _wrap(self, view: View, width: int) -> list[Line]:
        wrapped: dict[int, tuple[Record, list[Line]]] = {}
        for record in view.state.events:
            if (self.rank is None or record.rank == self.rank) and not (self.hides_progress and is_progress(record)):
                wrapped[id(record)] = self._wrapped.get(id(record)) or (record, self._wrap_record(record, width))
        self._wrapped = wrapped
        return [line for _, lines in wrapped.values() for line in lines]

    def _wrap_record(self, record: Record, width: int) -> list[Line]:
        """No lines when the filter leaves the record out."""
        severity = record_severity(record)
        whole = _text(record)
        text = clean(whole[:MOST_CHARACTERS])
        if not self.passes(severity, f"{SEVERITIES[severity][1]} {_who(record)} {text}"):
            return []
        room = max(20, width - PREFIX)
        pieces = self.folded(text, room)
        if len(whole) > MOST_CHARACTERS:
            pieces.append(f"… {len(whole) - MOST_CHARACTERS:,} more characters: zerotop logs")
        return [Line(piece, severity, record if not i else None) for i, piece in enumerate(pieces)]

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette = view.palette
        muted = palette.style("muted")
        if not self._lines:
            return [Row().add(" no match" if self.filter else " no events yet", muted)]
        first = self.scroll_offset.y
        rows: list[Row] = []
        for number, line in enumerate(self._lines[first : first + height], first):
            glyph, word, colour = SEVERITIES[line.severity]
            style = palette.style(colour) if colour != "muted" else PLAIN
            row = Row()
            if line.record is not None:
                row.add(f"{clock_text(line.record.wall_s):<8} ", muted)
                row.add(f"{glyph} {word:<5} ", palette.style(colour)).cell(_who(line.record), 6, muted)
            rows.append(self.text_row(row.to(PREFIX), line, style, number))
        return rows


def _who(record: Record) -> str:
    return "run" if record.rank is None else f"rank {record.rank}"


def _text(record: Record) -> str:
    if not isinstance(record, Event):
        return record_text(record)
    step = f" (step {record.step})" if record.step is not None and f"step {record.step}" not in record.text else ""
    if not record.text or record.text.lower().startswith((f"{record.what} ".lower(), f"{record.what}:".lower())):
        return f"{record.text or record.what}{step}"
    return f"{record.what}: {record.text}{step}"
