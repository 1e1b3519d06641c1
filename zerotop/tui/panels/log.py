"""All events and log records: by level and rank, wrapped or not, searched with highlights."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style

from zerotop.clean import clean
from zerotop.state.events import record_severity, record_text
from zerotop.tui.panels.events import EventPanel, Line
from zerotop.tui.text import SEVERITIES
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row

QUIET = "quiet"
LEVELS = (QUIET, "debug", "info", "warning", "error")
"""In the order of the key: all but progress lines, all, and then each level with what is worse."""
ORDER = {QUIET: 0, "debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 3}


class LogPanel(EventPanel):
    """`/` marks what it finds, and `m` leaves only the lines with it."""

    FILTER_HINT = "search: matches are highlighted; n and p go to the next and the one before, m shows only them"

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, title="log and events")
        self.level = QUIET
        self.only_matches = False
        self.wrapped_lines = True
        self._matches: list[int] = []
        """The lines that match."""
        self._match = -1

    def options(self) -> tuple[object, ...]:
        return (self.filter, self.level, self.only_matches, self.wrapped_lines, self.rank)

    def heading(self) -> str:
        title = "log and events" if self.rank is None else f"log and events of rank {self.rank}"
        if self.level == QUIET:
            title += " · progress lines hidden"
        elif self.level != "debug":
            title += f" · {self.level} and worse"
        title += "" if self.wrapped_lines else " · long lines cut"
        if self.filter:
            found = f"{self._match + 1} of {len(self._matches)}" if self._match >= 0 else str(len(self._matches))
            title += f" · “{self.filter}” {found}" + (" · only matching lines" if self.only_matches else "")
        return title

    @property
    def hides_progress(self) -> bool:
        return self.level == QUIET

    def passes(self, severity: str, text: str) -> bool:
        if ORDER[severity] < ORDER[self.level]:
            return False
        return not (self.only_matches and self.filter) or self.filter.lower() in text.lower()

    def folded(self, text: str, room: int) -> list[str]:
        return super().folded(text, room) if self.wrapped_lines else [text.splitlines()[0] if text else ""]

    def accept(self, view: View) -> None:
        super().accept(view)
        self.entitle(self.heading())

    def lines_changed(self) -> None:
        wanted = self.filter.lower()
        self._matches = [at for at, line in enumerate(self._lines) if wanted and wanted in line.text.lower()]
        if self._match >= len(self._matches):
            self._match = len(self._matches) - 1

    # ---- what keys do ----------------------------------------------------------------------------------------------
    def set_filter(self, text: str) -> None:
        """Highlight what contains `text`, and go to the newest of it."""
        super().set_filter(text)
        self._match = len(self._matches) - 1
        self._show_match()

    def next_match(self, by: int) -> None:
        """Go to another match."""
        if self._matches:
            self._match = (self._match + by) % len(self._matches)
            self._show_match()

    def _show_match(self) -> None:
        if 0 <= self._match < len(self._matches):
            line, height = self._matches[self._match], self.scrollable_content_region.height
            top = self.scroll_offset.y
            if not top <= line < top + height:
                self.scroll_to(y=max(0, line - height // 2), animate=False, immediate=True, force=True)
        self.redraw()

    def next_level(self) -> None:
        """Show from the next level on."""
        self.level = LEVELS[(LEVELS.index(self.level) + 1) % len(LEVELS)]
        self.redraw()

    def next_rank(self, by: int, count: int) -> None:
        """Show the records of one rank; all after the last one."""
        places: list[int | None] = [None, *range(count)]
        at = places.index(self.rank) if self.rank in places else 0
        self.rank = places[(at + by) % len(places)]
        self.forget()
        self.redraw()

    def rank_in_view(self) -> int | None:
        """The rank whose records are shown, or else that of the marked match; None if there is neither."""
        if self.rank is not None or not 0 <= self._match < len(self._matches):
            return self.rank
        above = reversed(self._lines[: self._matches[self._match] + 1])
        return next((line.record.rank for line in above if line.record is not None), None)

    def line_to_copy(self) -> str:
        """The text of the record with the marked match, or of the newest one in sight; "" where there is none."""
        top, height = int(self.scroll_offset.y), self.scrollable_content_region.height
        last = min(top + height, len(self._lines)) - 1
        at = self._matches[self._match] if 0 <= self._match < len(self._matches) else last
        for line in reversed(self._lines[: at + 1]):
            if line.record is not None:
                return clean(record_text(line.record))
        return ""

    def toggle_matches(self) -> None:
        """Show only lines that match, or all."""
        self.only_matches = not self.only_matches
        self.redraw()

    def toggle_wrap(self) -> None:
        """Wrap long lines, or cut them."""
        self.wrapped_lines = not self.wrapped_lines
        self.redraw()

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def text_row(self, row: Row, line: Line, style: Style, number: int) -> Row:
        if not self.filter or self.view is None:
            return row.add(line.text, style)
        palette = self.view.palette
        here = 0 <= self._match < len(self._matches) and self._matches[self._match] == number
        mark = palette.style("accent", bold=True, reverse=True) if here else palette.style("accent", reverse=True)
        return row.extend(highlighted(line.text, self.filter, style, mark))

    def severity_counts(self, view: View) -> dict[str, int]:
        """How many records of each level are kept."""
        counts: dict[str, int] = {}
        for record in view.state.events:
            word = SEVERITIES[record_severity(record)][1]
            counts[word] = counts.get(word, 0) + 1
        return counts


def highlighted(text: str, wanted: str, style: Style, mark: Style) -> list[Segment]:
    """The text with every occurrence of `wanted` in another style; upper and lower case are alike."""
    found: list[Segment] = []
    low, wanted, at = text.lower(), wanted.lower(), 0
    if len(low) != len(text) or not wanted:  # a character whose lower case is longer
        return [Segment(text, style)]
    while (place := low.find(wanted, at)) >= 0:
        found += [Segment(text[at:place], style), Segment(text[place : place + len(wanted)], mark)]
        at = place + len(wanted)
    return [segment for segment in [*found, Segment(text[at:], style)] if segment.text]
