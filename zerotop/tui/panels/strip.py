"""The life of the newest commands: sent, accepted, waiting for a boundary, applied at step S or rejected, and why."""

from __future__ import annotations

from zerotop.tui.commands import CommandLife
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row

LOOKS = {"sent": ("◌", "muted"), "accepted": ("◐", "warning"), "applied": ("✔", "success"), "rejected": ("✖", "error")}
MOST_LINES = 3


class CommandStrip(Panel):
    """Every open command has its line (up to three); the newest answered one stays, so that its answer can be read."""

    ALLOW_MAXIMIZE = False
    shown: tuple[CommandLife, ...] = ()

    def accept(self, view: View) -> None:
        super().accept(view)
        opened = [life for life in view.commands if life.open]
        last = list(view.commands[-1:])
        shown = tuple(opened[-MOST_LINES:] if opened else last)
        if len(shown) != len(self.shown):
            self.styles.height = len(shown)
            self.display = bool(shown)
            self._shown = None
        self.shown = shown

    def natural_height(self, width: int) -> int:
        return len(self.shown)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        rows = []
        for life in self.shown:
            glyph, colour = LOOKS[life.state]
            waited = (
                f"  {life.waited_s:.0f} s" if life.open and life.waited_s is not None and life.waited_s >= 2 else ""
            )
            rows.append(
                Row()
                .gap()
                .add(f"{glyph} ", view.palette.style(colour))
                .cell(life.text + waited, width - 3, view.palette.style(colour))
            )
        return rows
