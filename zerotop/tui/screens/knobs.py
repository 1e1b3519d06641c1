"""Change a setting of the running run: pick one, type a value, and see at once whether it is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from runtime.config.knobs import KNOBS, Knob, KnobError, KnobValue, parse_knob
from zerotop.tui.screens.palette import turn_page
from zerotop.tui.text import plain

Setting = tuple[str, KnobValue]


class KnobList(OptionList):
    """The settings and their values."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "cursor_up", show=False),
        Binding("j", "cursor_down", show=False),
        Binding("pageup", "turn_page(-1)", show=False),
        Binding("pagedown", "turn_page(1)", show=False),
    ]

    def action_turn_page(self, pages: int) -> None:
        """Move the highlight by whole pages."""
        turn_page(self, pages)


class KnobScreen(ModalScreen[Setting | None]):
    """Returns the setting to send, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]

    def __init__(self, values: Mapping[str, KnobValue], name: str = "") -> None:
        super().__init__()
        self.values = values
        self.chosen = KNOBS.get(name) or next(iter(KNOBS.values()))
        self._typing = name in KNOBS

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = plain("change a setting at the next step boundary")
            yield KnobList(*(Option(self._line(knob), id=knob.name) for knob in KNOBS.values()), id="knobs")
            yield Static(id="about")
            yield Input(id="value")
            yield Static(id="verdict-value")
            yield Static(
                Content.from_markup(
                    "[b $accent]↑ ↓[/] choose   [b $accent]Enter[/] type, then send   [b $accent]Esc[/] go back"
                ),
                classes="choices",
            )

    def _line(self, knob: Knob) -> Text:
        value = self.values.get(knob.name)
        now = "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        return Text(f"{knob.name:<20} {now} {knob.unit if value is not None else ''}")

    def on_mount(self) -> None:
        self.query_one(OptionList).highlighted = list(KNOBS).index(self.chosen.name)
        (self.query_one(Input) if self._typing else self.query_one(OptionList)).focus()

    @on(OptionList.OptionHighlighted)
    def _about(self, message: OptionList.OptionHighlighted) -> None:
        self.chosen = KNOBS[str(message.option.id)]
        allowed = self.chosen.allowed + (f" ({self.chosen.unit})" if self.chosen.unit else "")
        self.query_one("#about", Static).update(plain(f"{self.chosen.description}\n{allowed}"))
        field = self.query_one(Input)
        field.placeholder = f"new value of {self.chosen.name}"
        field.value = ""
        self._judge("")

    @on(OptionList.OptionSelected)
    def _type(self) -> None:
        self.query_one(Input).focus()

    @on(Input.Changed)
    def _changed(self, message: Input.Changed) -> None:
        self._judge(message.value)

    def _judge(self, text: str) -> KnobValue | None:
        """Say at once whether the value is allowed."""
        verdict = self.query_one("#verdict-value", Static)
        verdict.remove_class("good", "bad")
        if not text.strip():
            verdict.update("")
            return None
        try:
            value = parse_knob(self.chosen.name, text)
        except KnobError as error:
            verdict.update(plain(f"✖ {error}"))
            verdict.add_class("bad")
            return None
        verdict.update(plain(f"✔ Enter sends: set {self.chosen.name}={value}"))
        verdict.add_class("good")
        return value

    @on(Input.Submitted)
    def _send(self, message: Input.Submitted) -> None:
        value = self._judge(message.value)
        if value is not None:
            self.dismiss((self.chosen.name, value))

    def action_leave(self) -> None:
        """Back to the list, or out of the dialog."""
        if self.query_one(Input).has_focus:
            self.query_one(OptionList).focus()
        else:
            self.dismiss(None)
