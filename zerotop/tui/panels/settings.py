"""Every setting that can be changed while the run trains: its value, where that came from, what is allowed."""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from runtime.config.knobs import KNOBS, Knob
from zerotop.format import clock_text
from zerotop.state.outlook import next_boundary
from zerotop.state.settings import SettingValue, setting_values
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Panel, Row, ScrollPanel

COLUMNS = (("setting", 20, 100), ("value", 16, 95), ("from", 52, 60), ("allowed", 34, 80))


class SettingTable(ScrollPanel):
    """One line per setting; Enter changes the selected one."""

    READS = ("command_record", "step")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "select(-1)", "Previous setting", show=False),
        Binding("down", "select(1)", "Next setting", show=False),
        Binding("k", "select(-1)", show=False),
        Binding("j", "select(1)", show=False),
        Binding("enter", "open", "Change setting", show=False),
    ]

    class Chosen(Message):
        """The user wants to change a setting."""

        def __init__(self, name: str) -> None:
            self.name = name
            super().__init__()

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.selected = 0

    @property
    def rows_wanted(self) -> int:
        """Lines for all settings, the titles, the note on the selected one, and the borders."""
        return len(KNOBS) + 5 + self.gutter.height

    def inputs(self, view: View) -> object:
        return super().inputs(view), view.read_only

    def accept(self, view: View) -> None:
        self.have_lines(len(KNOBS) + 1)
        lock = " · ⊘ locked: read-only" if view.read_only else ""
        when = f"Enter changes one, at the end of step {next_boundary(view.state):,}" if not view.ended else "run ended"
        self.entitle(f"settings · {when}{lock}")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette, muted = view.palette, view.palette.style("muted")
        values = setting_values(view.state)
        hello = view.state.hello
        absent = ("n/a", f"not possible with {hello.trainer}") if hello is not None and hello.trainer else ()
        columns = list(COLUMNS)
        while sum(size + 1 for _, size, _ in columns) + 1 > width and len(columns) > 2:
            columns.remove(min(columns, key=lambda column: column[2]))
        head = Row().gap()
        for title, size, _ in columns:
            head.cell(title, size, muted).gap()
        rows = [head]
        for number, knob in enumerate(KNOBS.values()):
            chosen = number == self.selected
            row = Row().add("▌" if chosen else " ", palette.style("primary" if self.has_focus else "muted"))
            value = values.get(knob.name)
            for title, size, _ in columns:
                text, style = _cell(title, knob, value, palette.style("accent"), muted, absent)
                row.cell(text, size, Style(bold=True) if title == "setting" and chosen else style).gap()
            rows.append(row)
        chosen_knob = list(KNOBS.values())[self.selected]
        notes = [f"{chosen_knob.name}: {chosen_knob.description}", f"allowed: {chosen_knob.allowed}"]
        notes.append(origin_text(chosen_knob, values.get(chosen_knob.name), *absent[1:]))
        if len(rows) + len(notes) + 1 <= height:
            rows += [Row(), *(Row().gap().add(note, muted) for note in notes)]
        return rows[:height]

    def action_select(self, by: int) -> None:
        """Select another setting."""
        self.selected = max(0, min(len(KNOBS) - 1, self.selected + by))
        self.redraw()

    def action_open(self) -> None:
        """Change the selected one."""
        self.post_message(self.Chosen(list(KNOBS)[self.selected]))

    def on_click(self, event: events.Click) -> None:
        number = event.get_content_offset_capture(self).y - 1
        if 0 <= number < len(KNOBS):
            if number == self.selected and event.chain > 1:
                self.action_open()
            self.selected = number
            self.redraw()


def _cell(
    title: str, knob: Knob, value: SettingValue | None, changed: Style, muted: Style, absent: tuple[str, ...]
) -> tuple[str, Style]:
    if title == "setting":
        return knob.name, PLAIN
    if title == "value":
        return value_text(knob, value, *absent[:1]), changed if value is not None and value.step is not None else PLAIN
    if title == "from":
        return origin_text(knob, value, *absent[1:]), muted
    return knob.allowed, muted


def value_text(knob: Knob, value: SettingValue | None, absent: str = "not known yet") -> str:
    """The value with its unit; `absent` if there is none."""
    if value is None:
        return absent
    text = f"{value.value:g}" if isinstance(value.value, float) else str(value.value)
    return f"{text} {knob.unit}".strip()


def origin_text(knob: Knob, value: SettingValue | None, absent: str = "the ranks have not reported it") -> str:
    """Where the value came from; `absent` if there is none."""
    if value is None:
        return absent
    if value.step is not None:
        at = f", {clock_text(value.wall_s)}" if value.wall_s else ""
        who = f" by {value.who}" if value.who else ""
        return f"set at step {value.step:,}{at}{who}"
    return f"{knob.key} in the config, or its default" if knob.key else "the start of the run, or a checkpoint"


class FixedSettings(Panel, can_focus=True):
    """What only another launch can change."""

    READS = ()

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")
        self.entitle("fixed for this launch")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted, hello = view.palette.style("muted"), view.state.hello
        if hello is None:
            return [Row().add("waiting for ranks to connect", muted)]
        facts = [
            ("model", f"{hello.model_name or 'of the script'}, {hello.parameters:,} parameters"),
            ("trainer", hello.trainer) if hello.trainer else ("zero_optimization.stage", str(hello.stage)),
            ("precision", hello.precision),
            ("train_micro_batch_size_per_gpu", str(hello.micro_batch) if hello.micro_batch else "of the script"),
            ("gradient_accumulation_steps", str(hello.accumulation)),
            ("train_batch_size", str(hello.global_batch) if hello.global_batch else "of the script"),
            ("zerotop.data.seq_len", str(hello.seq_len) if hello.seq_len else "of the script"),
            ("zerotop.train.steps", f"{hello.steps:,}" if hello.steps is not None else "of the script"),
            ("ranks", f"{hello.world_size}, {hello.backend}"),
            ("torch", hello.torch_version),
            *([("config digest", hello.config_digest)] if hello.config_digest else []),
            ("attempt", f"{hello.attempt}, from step {hello.start_step:,}"),
        ]
        return [Row().cell(name, 32, muted).add(text) for name, text in facts[:height]]
