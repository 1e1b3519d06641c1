"""Two runs on one screen: their curves over each other, the verdict, and what differs. Both may still be running."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.style import Style
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.worker import get_current_worker

from zerotop.compare.curves import AXES, Point, RunCurves, read_curves
from zerotop.compare.report import (
    SIGNS,
    Comparison,
    compare_runs,
    comparison_text,
    config_difference,
    place_text,
)
from zerotop.compare.verdicts import Judgement
from zerotop.format import figure_text, ms_text, rate_text
from zerotop.output import CommandError
from zerotop.rundir.directory import RunEntry, read_entry
from zerotop.tui.keyflow import KeyFlow
from zerotop.tui.terminal import driver_class, leave_on_signals
from zerotop.tui.theme import DEFAULT, Palette, load_palettes
from zerotop.tui.widgets.keybar import KeyBar
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.overlay import Line, overlay_rows
from zerotop.tui.widgets.rows import Rows

SMOOTHED_SHARE = 50
READ_S = 2.0
"""How often the recordings of live runs are read again."""
_FIGURES: tuple[tuple[str, Callable[[Point], float | None], Callable[[float | None], str]], ...] = (
    ("loss", lambda point: point.loss, figure_text),
    ("gradient norm", lambda point: point.grad_norm, figure_text),
    ("learning rate", lambda point: point.lr, figure_text),
    ("speed", lambda point: point.tokens_per_s, rate_text),
    ("step time", lambda point: point.step_ms, ms_text),
)
_COLOURS: dict[Judgement, str] = {
    "better": "success",
    "worse": "error",
    "within noise": "primary",
    "unknown": "muted",
}


class CompareApp(KeyFlow[None]):
    """Shows runs `a` and `b` until the user leaves."""

    TITLE = "zerotop"
    CSS_PATH = "zerotop.tcss"
    CSS = """
    #compare-head { height: 3; background: $panel; }
    #compare-plot { height: 3fr; min-height: 5; }
    #compare-text { height: 2fr; min-height: 3; padding: 0 1; border-top: solid $line; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "Leave"),
        Binding("x", "next_axis", "Axis: step, time, tokens"),
        Binding("g", "next_figure", "Figure"),
        Binding("s", "smooth", "Smooth"),
        Binding("t", "next_theme", "Theme"),
        Binding("up,k", "scroll(-1)", "Up", show=False),
        Binding("down,j", "scroll(1)", "Down", show=False),
        Binding("ctrl+c", "leave", show=False),
    ]

    def __init__(self, a: RunEntry, b: RunEntry) -> None:
        super().__init__(driver_class=driver_class())
        self.entries = (a, b)
        self.comparison: Comparison | None = None
        self.problem = ""
        self.left_by: int | None = None
        """The signal that ended the screen, if one did."""
        self.axis_at = 0
        self.figure_at = 0
        self.smooth = True
        self._first_line = 0
        self._read_of: tuple[object, ...] = ()
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
        yield Rows(self._head, id="compare-head")
        yield Rows(self._plot, id="compare-plot")
        yield Rows(self._text, id="compare-text")
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

    # ---- reading ---------------------------------------------------------------------------------------------------
    @work(thread=True, exclusive=True)
    def read(self) -> None:
        """Read both recordings again if one has grown, and judge."""
        entries = tuple(read_entry(entry.path) for entry in self.entries)
        state = tuple((entry.status.state, _size(entry)) for entry in entries)
        if state == self._read_of:
            return
        try:
            curves = [read_curves(entry) for entry in entries]
        except CommandError as error:  # a run whose recording has only just been made
            self.problem = str(error)
            self.call_from_thread(self._redraw)
            return
        found = compare_runs(curves[0], curves[1], config_difference(*entries), ("loss", "speed"))
        if not get_current_worker().is_cancelled:
            self._read_of = state
            self.call_from_thread(self.show_comparison, found)

    def show_comparison(self, comparison: Comparison) -> None:
        """Draw a comparison."""
        self.comparison, self.problem = comparison, ""
        self._redraw()

    def _redraw(self) -> None:
        for rows in self.query(Rows):
            rows.redraw()
        for bar in self.query(KeyBar):
            bar.palette = self.palette
            bar.refresh()

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def _styles(self) -> tuple[Style, Style]:
        return self.palette.plot("loss"), self.palette.plot("evaluation")

    def _head(self, width: int, height: int) -> list[Row]:
        muted = self.palette.style("muted")
        comparison = self.comparison
        if comparison is None:
            return [Row().gap().add(self.problem or "reading the recordings …", muted)]
        found = comparison.judgement
        colour = self.palette.style(_COLOURS[found], bold=True)
        title = f"{SIGNS[found]} {comparison.b.name} beside {comparison.a.name}: {found}"
        head = Row().gap().add(title, colour)
        for verdict in comparison.verdicts.values():
            head.gap(2).add(
                f"{SIGNS[verdict.judgement]} {verdict.figure}", self.palette.style(_COLOURS[verdict.judgement])
            )
        rows = [head]
        for run, style in zip((comparison.a, comparison.b), self._styles(), strict=True):
            rows.append(_run_row(run, style, muted))
        return rows[:height]

    def _plot(self, width: int, height: int) -> list[Row]:
        comparison = self.comparison
        muted = self.palette.style("muted")
        if comparison is None or height < 2:
            return []
        axis = AXES[self.axis_at]
        title, value, text = _FIGURES[self.figure_at]
        runs = (comparison.a, comparison.b)
        lines = []
        for run, style in zip(runs, self._styles(), strict=True):
            pairs = [(point.at(axis), value(point)) for point in run.points]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            lines.append(Line(smoothed(points) if self.smooth else points, style))
        smooth = ", smoothed" if self.smooth else ""
        heading = Row().gap().add(f"{title} by {axis}{smooth}", self.palette.style("primary", bold=True))
        mark = self._branch_mark(runs)
        if mark is not None:
            heading.add("   │ the branch", muted)
        plot = overlay_rows(lines, width, height - 1, text, lambda x: place_text(axis, x), muted, mark)
        return [heading, *plot]

    def _branch_mark(self, runs: tuple[RunCurves, RunCurves]) -> float | None:
        axis = AXES[self.axis_at]
        for run in runs:
            if run.branch_step is not None:
                there = [point.at(axis) for point in run.points if point.step <= run.branch_step]
                return there[-1] if there else None
        return None

    def _text(self, width: int, height: int) -> list[Row]:
        if self.comparison is None:
            return []
        lines = comparison_text(self.comparison).splitlines()[1:]
        self._first_line = min(self._first_line, max(0, len(lines) - height))
        return [Row().add(line[:width], PLAIN) for line in lines[self._first_line : self._first_line + height]]

    # ---- keys ------------------------------------------------------------------------------------------------------
    def action_leave(self) -> None:
        """q: leave; the runs go on."""
        self.exit()

    def action_next_axis(self) -> None:
        """x: by step, by time, by tokens."""
        self.axis_at = (self.axis_at + 1) % len(AXES)
        self._redraw()

    def action_next_figure(self) -> None:
        """g: the next figure."""
        self.figure_at = (self.figure_at + 1) % len(_FIGURES)
        self._redraw()

    def action_smooth(self) -> None:
        """s: smooth the curves, or show every step."""
        self.smooth = not self.smooth
        self._redraw()

    def action_next_theme(self) -> None:
        """t: the next theme."""
        names = list(self.palettes)
        self.theme = names[(names.index(self.theme) + 1) % len(names)]

    def action_scroll(self, lines: int) -> None:
        """Up and down: the text."""
        self._first_line = max(0, self._first_line + lines)
        self.query_one("#compare-text", Rows).redraw()


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average over about a fiftieth of the points; each curve is smoothed from its first point,
    so that a branch and its trunk stay together."""
    weight = 2 / (1 + max(1.0, len(points) / SMOOTHED_SHARE))
    found: list[tuple[float, float]] = []
    for x, y in points:
        before = found[-1][1] if found else y
        found.append((x, before + weight * (y - before)) if math.isfinite(y) else (x, before))
    return found


def _run_row(run: RunCurves, style: Style, muted: Style) -> Row:
    newest = run.points[-1] if run.points else None
    row = Row().gap().add("━━ ", style).add(run.name, style).add(f"  {run.state}", muted)
    if run.branch_of is not None:
        row.add(f"  branch of {run.branch_of} at step {run.branch_step}", muted)
    if newest is not None:
        row.add("  step ", muted).add(str(newest.step)).add("  loss ", muted).add(figure_text(newest.loss))
        row.add("  lr ", muted).add(figure_text(newest.lr)).add("  ", muted).add(rate_text(newest.tokens_per_s))
    return row


def _size(entry: RunEntry) -> tuple[int, ...]:
    """What changes when the recording grows."""
    found = []
    for name in ("recording.sqlite", "recording.sqlite-wal"):
        try:
            stat = (entry.path / name).stat()
        except FileNotFoundError:
            continue
        found += [stat.st_size, stat.st_mtime_ns]
    return tuple(found)
