"""Every command that was given to the run: by whom, when, and what became of it."""

from __future__ import annotations

from rich.style import Style

from runtime.wire.messages import CommandRecord
from zerotop.format import clock_text
from zerotop.state.run import waits_for
from zerotop.tui.panels.strip import LOOKS
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Row, ScrollPanel, fit


class CommandAudit(ScrollPanel):
    """The newest command first."""

    READS = ("command_record",)

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._records: list[CommandRecord] = []

    def accept(self, view: View) -> None:
        self._records = list(reversed(view.state.commands.values()))
        self.have_lines(len(self._records))
        self.entitle(f"commands · {len(self._records)}")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        if not self._records:
            return [Row().add("no command was given in this run", muted)]
        first = self.scroll_offset.y
        return [_row(view, record, width, muted) for record in self._records[first : first + height]]


def _row(view: View, record: CommandRecord, width: int, muted: Style) -> Row:
    command, ack = record.command, record.ack
    glyph, colour = LOOKS[ack.state]
    arguments = " ".join(f"{key}={value}" for key, value in command.arguments.items())
    name = f"{command.name} {arguments}".strip()
    at = clock_text(ack.wall_s or command.wall_s) if ack.wall_s or command.wall_s else ""
    row = Row().cell(at, 9, muted).add(f"{glyph} ", view.palette.style(colour))
    row.cell(f"#{command.number}" if command.number else "", 4, muted).gap()
    if ack.state == "applied":
        what = f"applied at step {ack.step:,}" if ack.step is not None else "applied"
    elif ack.state == "rejected":
        what = f"rejected: {ack.reason or 'no reason given'}"
    else:
        what = f"accepted, {waits_for(record)}"
    text = f"{name} · {what}"
    who = f" by {command.who}" if command.who else ""
    room = max(0, width - row.width)
    row.add(fit(text, min(len(text), room)).rstrip(), PLAIN if ack.state != "rejected" else view.palette.style("error"))
    return row.add(who[: max(0, width - row.width)], muted)
