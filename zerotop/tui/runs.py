"""The list of runs: state, step, the loss curve in a cell, memory, age and the newest note; Enter opens one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.worker import get_current_worker

from zerotop.documents import planned_steps
from zerotop.format import bytes_text, duration_text, figure_text
from zerotop.recording.glance import Glance, glance
from zerotop.rundir.directory import RunEntry, RunError, list_runs, runs_home
from zerotop.rundir.notes import read_notes
from zerotop.tui.keyflow import KeyFlow
from zerotop.tui.terminal import driver_class, leave_on_signals
from zerotop.tui.text import STATES
from zerotop.tui.theme import DEFAULT, Palette, load_palettes
from zerotop.tui.widgets.keybar import KeyBar
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.rows import Rows

READ_S = 2.0
"""How often the run directories are looked at."""
CURVE = 14
"""Cells of a loss curve."""
_LEVELS = "▁▂▃▄▅▆▇█"
Choice = tuple[str, str]
"""("open" or "replay", name of the run) or ("demo", "")."""


@dataclass(frozen=True)
class RunLine:
    """What the list shows of a run."""

    entry: RunEntry
    glance: Glance
    steps: int | None
    note: str


def curve_text(losses: Sequence[float], cells: int = CURVE) -> str:
    """A curve of block characters: the mean of each cell's share, between the lowest and the highest. The first
    twentieth of the points, in which a loss falls steeply, does not set the scale."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return "·" * min(cells, len(losses))
    cells = min(cells, len(losses))
    means = []
    for cell in range(cells):
        share = losses[cell * len(losses) // cells : (cell + 1) * len(losses) // cells]
        known = [loss for loss in share if math.isfinite(loss)]
        means.append(sum(known) / len(known) if known else math.nan)
    later = [mean for mean in means[len(means) // 20 :] if math.isfinite(mean)]
    low, high = min(later), max(later)
    span = high - low or 1.0
    text = ""
    for mean in means:
        level = round((min(mean, high) - low) / span * (len(_LEVELS) - 1)) if math.isfinite(mean) else None
        text += "×" if level is None else _LEVELS[level]
    return text


class RunsApp(KeyFlow[Choice | None]):
    """`run()` returns what the user chose, None if he leaves. demo_problem: why no demo run can be started here."""

    TITLE = "zerotop"
    CSS_PATH = "zerotop.tcss"
    CSS = "#runs { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open('open')", "Open"),
        Binding("r", "open('replay')", "Replay"),
        Binding("d", "demo", "Demo run"),
        Binding("t", "next_theme", "Theme"),
        Binding("q,escape", "leave", "Leave"),
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move(-10)", "Ten up", show=False),
        Binding("pagedown", "move(10)", "Ten down", show=False),
        Binding("home", "move(-100000)", "Top", show=False),
        Binding("end", "move(100000)", "Bottom", show=False),
        Binding("ctrl+c", "leave", show=False),
    ]

    def __init__(self, demo_problem: str = "", selected: str = "") -> None:
        super().__init__(driver_class=driver_class())
        self.demo_problem = demo_problem
        self.lines: list[RunLine] | None = None
        self.problem = ""
        self.selected = selected
        self.left_by: int | None = None
        """The signal that ended the screen, if one did."""
        self._known: dict[str, tuple[tuple[object, ...], RunLine]] = {}
        self.palettes, _ = load_palettes()
        for palette in self.palettes.values():
            self.register_theme(palette.theme())
        wanted = os.environ.get("ZEROTOP_THEME", DEFAULT)
        self.theme = wanted if wanted in self.palettes else DEFAULT

    @property
    def palette(self) -> Palette:
        """The colours of the current theme."""
        return self.palettes.get(self.theme, self.palettes[DEFAULT])

    def compose(self) -> ComposeResult:
        yield Rows(self._draw, id="runs")
        yield KeyBar(self.palette)

    def on_mount(self) -> None:
        if not self.is_headless:
            leave_on_signals(self._leave_by)
        self.theme_changed_signal.subscribe(self, lambda _: self._redraw())
        self.set_interval(READ_S, self.read)
        self.read()

    def _leave_by(self, number: int) -> None:
        self.left_by = number
        self.exit()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "open":
            return bool(self.lines)
        return not (action == "demo" and self.demo_problem)

    # ---- reading ---------------------------------------------------------------------------------------------------
    @work(thread=True, exclusive=True)
    def read(self) -> None:
        """Look at the run directories; recordings that have not grown are not read again."""
        try:
            entries = list_runs()
        except RunError as error:
            self.problem = str(error)
            entries = []
        lines = []
        for entry in entries:
            lines.append(self._line(entry))
            if get_current_worker().is_cancelled:
                return
        self.call_from_thread(self.show_lines, lines)

    def _line(self, entry: RunEntry) -> RunLine:
        stamp = (
            entry.status,
            _stamp(entry, "recording.sqlite-wal"),
            _stamp(entry, "recording.sqlite"),
            _stamp(entry, "notes.jsonl"),
        )
        known = self._known.get(entry.name)
        if known is None or known[0] != stamp:
            notes = read_notes(entry.path)
            line = RunLine(entry, glance(entry.path), planned_steps(entry), notes[-1].text if notes else "")
            known = self._known[entry.name] = (stamp, line)
        return known[1]

    def show_lines(self, lines: list[RunLine]) -> None:
        """Draw a list."""
        self.lines = lines
        names = [line.entry.name for line in lines]
        if self.selected not in names:
            self.selected = names[0] if names else ""
        self.refresh_bindings()
        self._redraw()

    def _redraw(self) -> None:
        for rows in self.query(Rows):
            rows.redraw()
        for bar in self.query(KeyBar):
            bar.palette = self.palette
            bar.refresh()

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def _draw(self, width: int, height: int) -> list[Row]:
        palette = self.palette
        muted, strong = palette.style("muted"), palette.style("primary", bold=True)
        if self.lines is None:
            return [Row().gap().add("looking for runs …", muted)]
        if not self.lines:
            return self._welcome()
        name, state, step, curve = _columns(width)
        head = Row().gap(2).cell("run", name, muted).gap().cell("state", state, muted).gap().cell("step", step, muted)
        head.gap().cell("loss", curve + 8, muted).gap().cell("memory", 9, muted, right=True)
        head.gap(2).cell("age", 9, muted).add("note", muted)
        names = [line.entry.name for line in self.lines]
        at = names.index(self.selected) if self.selected in names else 0
        shown = max(1, height - 3)
        first = min(max(0, at - shown // 2), max(0, len(names) - shown))
        title = Row().gap().add("runs", strong).add(f"  {len(names)} in {runs_home()}", muted)
        rows = [title, Row(), head]
        for line in self.lines[first : first + shown]:
            rows.append(self._run_row(line, line.entry.name == self.selected, width))
        return rows[:height]

    def _run_row(self, line: RunLine, selected: bool, width: int) -> Row:
        palette, entry, seen = self.palette, line.entry, line.glance
        muted = palette.style("muted")
        glyph, colour = STATES[entry.status.state]
        step = max(entry.status.step, seen.step or 0)
        of = f"/{line.steps}" if line.steps is not None else ""
        row = Row().add("▌ " if selected else "  ", palette.style("accent", bold=True))
        of_name, of_state, of_step, of_curve = _columns(width)
        row.cell(entry.name, of_name, palette.style("primary", bold=True) if selected else PLAIN).gap()
        row.cell(f"{glyph} {entry.status.state}", of_state, palette.style(colour)).gap()
        row.cell(f"{step}{of}", of_step).gap()
        row.cell(curve_text(seen.losses, of_curve), of_curve, palette.plot("loss")).gap()
        row.cell(figure_text(seen.loss) if seen.loss is not None else "", 7).gap()
        row.cell(bytes_text(seen.memory_bytes) if seen.memory_bytes else "", 9, right=True).gap(2)
        row.cell(_age(entry), 9, muted)
        text = line.note or (entry.status.reason if entry.status.state in ("failed", "aborted") else "")
        rest = width - row.width - 1
        if text and rest > 4:
            row.cell(text, rest, muted)
        return row

    def _welcome(self) -> list[Row]:
        palette = self.palette
        muted, accent, strong = (
            palette.style("muted"),
            palette.style("accent", bold=True),
            palette.style("primary", bold=True),
        )
        rows = [Row(), Row().gap(2).add("There are no runs yet.", strong), Row()]
        if self.problem:
            rows += [Row().gap(2).add(self.problem, palette.style("error")), Row()]
        if self.demo_problem:
            rows.append(Row().gap(2).add(self.demo_problem, palette.style("warning")))
        else:
            rows.append(Row().gap(2).add("d", accent).add("  starts a demo run: two ranks on this CPU, ZeRO stage 2"))
        rows.append(Row())
        for command, what in (
            ("zerotop launch config.json", "train, and watch"),
            ("zerotop launch config.json -- train.py", "with a script of your own"),
            ("zerotop plan config.json --gpus 8 --vram 80GiB", "what fits, at which ZeRO stage"),
            ("zerotop attach user@gpu-box", "watch another machine's run"),
            ("zerotop doctor", "what this machine has"),
        ):
            rows.append(Row().gap(2).cell(command, 47).add(what, muted))
        return rows

    # ---- keys ------------------------------------------------------------------------------------------------------
    def action_move(self, by: int) -> None:
        """Up and down."""
        names = [line.entry.name for line in self.lines or ()]
        if names:
            at = names.index(self.selected) + by if self.selected in names else 0
            self.selected = names[min(max(at, 0), len(names) - 1)]
            self._redraw()

    def action_open(self, what: str) -> None:
        """Enter: the screen on the run; r: its replay."""
        if self.selected:
            self.exit((what, self.selected))

    def action_demo(self) -> None:
        """d: a demo run."""
        self.exit(("demo", ""))

    def action_next_theme(self) -> None:
        """t: the next theme."""
        names = list(self.palettes)
        self.theme = names[(names.index(self.theme) + 1) % len(names)]

    def action_leave(self) -> None:
        """q: leave."""
        self.exit(None)


def _columns(width: int) -> tuple[int, int, int, int]:
    """Cells for name, state, step and loss curve."""
    return (20, 12, 13, CURVE) if width >= 100 else (14, 11, 11, 10)


def _age(entry: RunEntry) -> str:
    """How long a live run has been up; how long ago another one ended."""
    status = entry.status
    if entry.live:
        return f"up {duration_text(time.time() - (status.started_wall_s or entry.run.created_wall_s))}"[:9]
    ended = status.ended_wall_s or status.started_wall_s or entry.run.created_wall_s
    return duration_text(time.time() - ended)


def _stamp(entry: RunEntry, name: str) -> tuple[int, int] | None:
    try:
        found = (entry.path / name).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
