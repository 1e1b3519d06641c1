"""The time bar of a replay: where in the recording the screen is, what happens there, and what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.style import Style

from zerotop.format import clock_text, duration_text
from zerotop.recording.marks import Mark
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Band, Row

TALL = 30
"""From this height on, a second line says what happens now and next."""
_GLYPHS = {"error": ("✖", "error"), "warning": ("▲", "warning"), "info": ("●", "primary")}
_DAY_S = 86_400


@dataclass(frozen=True)
class ReplayStatus:
    """Where a replay is. `now`: what happens in the current frame; `following`: what happens next."""

    playing: bool
    wall_s: float
    begin_s: float
    end_s: float
    frame: int
    frames: int
    frame_s: float
    speed: float
    marks: tuple[Mark, ...]
    now: tuple[Mark, ...]
    following: Mark | None


class TimeBar(Band):
    """`REPLAY | time | frame N/M | speed`, and a bar with a mark for each warning, error and checkpoint."""

    can_focus = False
    DEFAULT_CSS = "TimeBar { dock: bottom; margin: 0 0 1 0; background: $panel; }"

    def __init__(self, status: Callable[[], ReplayStatus], lines: int) -> None:
        super().__init__(id="time-bar")
        self._status = status
        self.take(lines)

    @staticmethod
    def lines_for(height: int) -> int:
        """How many lines it takes on a screen of this height."""
        return 2 if height >= TALL else 1

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        status = self._status()
        return [_bar_line(status, view.palette, width), _text_line(status, view.palette, width)][:height]


def _bar_line(status: ReplayStatus, palette: Palette, width: int) -> Row:
    muted, accent = palette.style("muted"), palette.style("accent", bold=True)
    row = Row().gap().add("▶ " if status.playing else "‖ ", accent).add("REPLAY", accent).add(" │ ", muted)
    row.add(_time(status, width >= 100))
    spacing = f" of {duration_text(status.frame_s)}" if width >= 120 and status.frame_s > 1 else ""
    tail = f" │ frame {status.frame + 1:,}/{status.frames:,}{spacing} │ {status.speed:g}x "
    room = width - row.width - len(tail) - 2
    if room >= 6:
        row.gap().extend(_track(status, palette, room).segments).to(width - len(tail))
    return row.add(tail, muted)


def _time(status: ReplayStatus, roomy: bool) -> str:
    gone = duration_text(status.wall_s - status.begin_s)
    clock = clock_text(status.wall_s)
    if status.end_s - status.begin_s > _DAY_S / 2:
        clock = time.strftime("%a ", time.localtime(status.wall_s)) + clock
    return f"{clock} │ {gone} of {duration_text(status.end_s - status.begin_s)}" if roomy else clock


def _track(status: ReplayStatus, palette: Palette, width: int) -> Row:
    """The bar: played and to come, with the gravest mark of each cell."""
    place = min(width - 1, round(status.frame * (width - 1) / max(1, status.frames - 1)))
    order = ("info", "warning", "error")
    found: dict[int, str] = {}
    whole_s = max(1e-9, status.end_s - status.begin_s)
    for mark in status.marks:
        if mark.severity == "info" and mark.what != "checkpoint":
            continue
        cell = min(width - 1, max(0, int((mark.wall_s - status.begin_s) / whole_s * width)))
        found[cell] = max(found.get(cell, "info"), mark.severity, key=order.index)
    if len(found) > width // 3:  # checkpoints alone would fill the bar
        found = {cell: severity for cell, severity in found.items() if severity != "info"}
    row = Row()
    for cell in range(width):
        if cell == place:
            row.add("█", palette.style("accent", bold=True))
        elif cell in found:
            glyph, colour = _GLYPHS[found[cell]]
            row.add("│" if found[cell] == "info" else glyph, palette.style("muted" if colour == "primary" else colour))
        else:
            row.add("━" if cell < place else "─", palette.style("primary" if cell < place else "border"))
    return row


def _text_line(status: ReplayStatus, palette: Palette, width: int) -> Row:
    muted = palette.style("muted")
    row = Row().gap()
    if status.now:
        mark = max(status.now, key=lambda one: ("info", "warning", "error").index(one.severity))
        more = f" (and {len(status.now) - 1} more)" if len(status.now) > 1 else ""
        _say(row, "now", mark, mark.text + more, palette, PLAIN)
    if status.following is not None:
        mark = status.following
        when = f"in {duration_text(mark.wall_s - status.wall_s)}" if mark.wall_s > status.wall_s else "now"
        rest = width - row.width - 12 - len(when)
        if rest >= 12:
            _say(row.gap(2) if status.now else row, f"next {when}", mark, mark.text[:rest], palette, muted)
    elif not status.now:
        row.add("nothing more happens", muted)
    return row


def _say(row: Row, label: str, mark: Mark, text: str, palette: Palette, style: Style) -> None:
    glyph, colour = _GLYPHS[mark.severity]
    row.add(f"{label} ", palette.style("muted")).add(f"{glyph} ", palette.style(colour)).add(text, style)
