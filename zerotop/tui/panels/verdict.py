"""What is wrong, in one place: why the run ended badly, why it stands still, whom the others wait for. Takes no room
otherwise.
"""

from __future__ import annotations

import re
import textwrap

from runtime.wire.messages import RunStatus
from zerotop.clean import clean
from zerotop.output import with_exit_code
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Band, Row

ERROR_LINES, ERROR_CHARACTERS = 6, 4000
ERROR_FROM = 22
"""A screen must be higher than this to show any line of the error itself: the panels come first."""


class VerdictLine(Band):
    lines: tuple[tuple[str, str], ...] = ()

    def accept(self, view: View) -> None:
        super().accept(view)
        width = max(20, (self.screen.size.width or 80) - 3)
        lines: list[tuple[str, str]] = []
        for glyph, text, colour in verdicts(view):
            for i, piece in enumerate(textwrap.wrap(text, width - 2)[:2] or [""]):
                lines.append((f"{glyph if not i else ' '} {piece}", colour))
        status = view.state.status
        if status is not None and status.error:
            tail = clean(status.error[-ERROR_CHARACTERS:]).rstrip().splitlines()
            room = min(ERROR_LINES, max(0, self.screen.size.height - ERROR_FROM))
            lines += [(f"  {piece}", "error") for piece in tail[len(tail) - min(room, len(tail)) :]]
        if tuple(lines) != self.lines:
            self.lines = tuple(lines)
            self.take(len(lines))

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        return [
            Row().gap().add(text, view.palette.style(colour, bold=not i)) for i, (text, colour) in enumerate(self.lines)
        ]


def verdicts(view: View) -> list[tuple[str, str, str]]:
    """(glyph, text, colour of [ui]), worst first."""
    found: list[tuple[str, str, str]] = []
    status = view.state.status
    if status is not None and status.state == "failed":
        found.append(("✖", f"the run failed: {_failure(status)}", "error"))
    elif status is not None and status.state == "aborted":
        found.append(("✖", f"the run was aborted{': ' + status.reason if status.reason else ''}", "error"))
    if view.stall is not None:
        found.append(("▲", view.stall.text, "error"))
    elif view.laggard is not None:
        found.append(("▲", view.laggard.text, "warning"))
    return found


def _failure(status: RunStatus) -> str:
    """Which rank, why, and the exit code, each of them once: the reason may name the rank, and a signal is the code."""
    reason = status.reason or "no reason given"
    named = status.failed_rank is None or re.search(rf"\brank {status.failed_rank}\b", reason)
    return ("" if named else f"rank {status.failed_rank}: ") + with_exit_code(reason, status.exit_code)
