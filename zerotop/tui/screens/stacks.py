"""The stacks of all ranks: asks once, and shows the answer when it arrives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from runtime.wire.messages import CommandRecord
from zerotop.clean import clean
from zerotop.tui.text import plain
from zerotop.tui.theme import Palette
from zerotop.tui.view import TICK_S

_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
_NATIVE = re.compile(r"^  C (.+) \(([^()]*)\)$")
_LIBRARIES = re.compile(r"^.*/(?:site-packages|dist-packages|lib/python3\.\d+)/")
BACK = "Esc goes back"
_HEADING = re.compile(r"^ranks? [\d, -]+, .* thread \(|^rank \d+, process \d+ as |^(?:Flight Recorder|NCCL RAS) \(")
_WHERE = re.compile(r"^(?:(?:all )?\d+ ranks|ranks? [\d, -]+)(?: alone)?: ")
"""The line that says where the ranks are, outliers last."""


class StacksScreen(ModalScreen[None]):
    """`answer` returns the record of the command; None if the hub has not reported one yet."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "leave", "Back"),
        Binding("home", "to_top", "Top", show=False),
        Binding("end", "to_end", "Bottom", show=False),
        Binding("k", "scroll_by(-1)", show=False),
        Binding("j", "scroll_by(1)", show=False),
    ]

    def __init__(self, palette: Palette, run: str, answer: Callable[[], CommandRecord | None]) -> None:
        super().__init__()
        self.palette = palette
        self.run_name = run
        self.answer = answer
        self._shown = False

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog stacks") as dialog:
            dialog.border_title = plain(f"stacks of {self.run_name}")
            dialog.border_subtitle = plain(BACK)
            yield Static(plain("waiting for the ranks; this takes some seconds if one of them is stuck"))

    def on_mount(self) -> None:
        self.set_interval(TICK_S, self.look)
        self.look()

    def look(self) -> None:
        """Show the answer once it is there."""
        record = self.answer()
        if self._shown or record is None or record.ack.state == "accepted":
            return
        self._shown = True
        ack = record.ack
        if ack.state == "rejected":
            text = Text(clean(ack.reason) or "rejected, and no reason given", self.palette.style("error"))
        else:
            text = stacks_text(str(ack.result.get("text", "")), self.palette)
            path = ack.result.get("path")
            self.query_one(VerticalScroll).border_subtitle = plain(f"{path} · {BACK}" if path else BACK)
        self.query_one(Static).update(text)

    def action_scroll_by(self, lines: int) -> None:
        """k and j: as the arrows."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_to_top(self) -> None:
        """Home: to the top."""
        self.query_one(VerticalScroll).scroll_home(animate=False)

    def action_to_end(self) -> None:
        """End: to the bottom."""
        self.query_one(VerticalScroll).scroll_end(animate=False)

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss(None)


def stacks_text(text: str, palette: Palette) -> Text:
    """The report in colours, each frame short enough for a narrow terminal: the function, then its place without the
    folder that contains all libraries. The file has the whole paths."""
    muted, heading = palette.style("muted"), palette.style("primary", bold=True)
    shown = Text()
    for number, line in enumerate(clean(text).splitlines()):
        frame = _FRAME.match(line)
        if frame:
            shown.append(f"  {frame[3]}").append(f"  {_LIBRARIES.sub('', frame[1])}:{frame[2]}\n", muted)
        elif native := _NATIVE.match(line):
            shown.append(f"  {native[1]}  {native[2]}\n", muted)
        elif (number == 2 and _WHERE.match(line)) or _HEADING.match(line):
            shown.append(f"{line}\n", heading)
        else:
            shown.append(f"{line}\n", palette.style("foreground", bold=True) if number == 1 else "")
    return shown
