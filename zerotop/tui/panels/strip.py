"""The state of the newest commands: sent, accepted, applied at step S, or rejected with the reason."""

from __future__ import annotations

from zerotop.format import duration_text
from zerotop.tui.commands import CommandLife
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Band, Row

LOOKS = {"sent": ("◌", "muted"), "accepted": ("◐", "warning"), "applied": ("✔", "success"), "rejected": ("✖", "error")}
MOST_LINES = 3


class CommandStrip(Band):
    """Every open command has its line (up to three); otherwise the newest answer has one for some seconds."""

    shown: tuple[CommandLife, ...] = ()

    def inputs(self, view: View) -> object:
        return self.shown

    def notice(self, view: View) -> None:
        opened = [life for life in view.commands if life.open]
        answered = [life for life in view.commands if life.fresh and not life.open]
        self.shown = tuple(opened[-MOST_LINES:] or answered[-1:])
        if len(self.shown) != self.lines_wanted:
            self.take(len(self.shown))

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        rows = []
        for life in self.shown:
            glyph, colour = LOOKS[life.state]
            if life.fading:
                colour = "muted"
            waited_s = life.waited_s if life.open else None
            waited = f"  {duration_text(waited_s)}" if waited_s is not None and waited_s >= 2 else ""
            rows.append(
                Row()
                .gap()
                .add(f"{glyph} ", view.palette.style(colour))
                .cell(life.text + waited, width - 3, view.palette.style(colour))
            )
        return rows
