"""Figures over steps: a smoothed line over the range of the values, evaluations, what happened when, and a cursor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from textual import events
from textual.message import Message

from runtime.wire.messages import StepResult
from zerotop.format import (
    count_text,
    figure_text,
    ms_text,
    ms_tick_text,
    percent_tick_text,
    perplexity_text,
    tick_text,
)
from zerotop.state.efficiency import efficiency_of
from zerotop.state.evaluations import Evaluations, perplexity
from zerotop.state.marks import step_marks
from zerotop.state.run import RunState
from zerotop.state.smoothing import envelope, smooth
from zerotop.tui.abilities import Figured, Zoomable
from zerotop.tui.lens import Lens, extent
from zerotop.tui.panels.evaluation_rows import evaluation_rows
from zerotop.tui.text import MARKS
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import RARE, Panel, Row
from zerotop.tui.widgets.plot import AxisMark, Curve, Drawn, Look, draw_plot

Value = Callable[[StepResult, RunState], float | None]
BESIDE_STEPS = ("evaluation", "event", "checkpoint_saved", "command_record")
"""Kinds of messages that draw a plot again at once; steps do so when it has moved on by a cell."""
WHEEL = 1.25
"""The factor of one turn of the mouse wheel."""


@dataclass(frozen=True)
class Figure:
    """`value(point, state)` is None where the step has no such figure. text: a value, for a readout; tick: a value and
    the distance of ticks, for the axis."""

    title: str
    color: str  # of [plots]
    value: Value
    text: Callable[[float], str] = figure_text
    tick: Callable[[float, float], str] = tick_text
    evaluated: bool = False
    """Whether the evaluation loss and the losses of earlier runs belong into the same plot."""
    stepped: bool = False
    """A schedule: it is never smoothed."""


def _throughput(point: StepResult, state: RunState) -> float | None:
    # Series keeps one rank's steps. All ranks take the same steps with equal micro-batches, so the run's rate is that
    # many times its own.
    return None if point.tokens_per_s is None else point.tokens_per_s * max(1, state.world_size)


def _mfu(point: StepResult, state: RunState) -> float | None:
    return efficiency_of(state.hello, point.tokens_per_s).mfu


LOSS = Figure("loss", "loss", lambda point, _: point.loss, evaluated=True)
NORM = Figure("gradient norm", "norm", lambda point, _: point.grad_norm)
RATE = Figure("learning rate", "norm", lambda point, _: point.lr, stepped=True)
SCALE = Figure("loss scale", "norm", lambda point, _: point.loss_scale, lambda value: f"{value:g}", stepped=True)
THROUGHPUT = Figure("tokens/s", "throughput", _throughput, count_text)
STEP_TIME = Figure("step time", "throughput", lambda point, _: point.step_ms, ms_text, ms_tick_text)
WAIT = Figure("exposed communication", "throughput", lambda point, _: point.wait_ms, ms_text, ms_tick_text)
MFU = Figure("MFU", "throughput", _mfu, lambda value: f"{value:.1%}", percent_tick_text)
LEARNING = (LOSS, NORM, RATE)
SPEED = (THROUGHPUT, STEP_TIME, WAIT, MFU)
PERPLEXITY = "perplexity"


class PlotPanel(Panel, Zoomable, Figured, can_focus=True):
    """Plots one of `figures` at a time. `key` is the number of the screen that has more of it."""

    READS = ("step", *BESIDE_STEPS)

    class LensChanged(Message):
        """The user chose other steps, or another place for the cursor."""

        def __init__(self, lens: Lens) -> None:
            self.lens = lens
            super().__init__()

    def __init__(self, key: str, figures: tuple[Figure, ...], *, id: str) -> None:
        super().__init__(id=id)
        self.key = key
        self.figures = figures
        self.chosen = 0
        self._drawn = Drawn([])
        self._legend = 0
        self._drawn_key: tuple[object, ...] = ()
        self._newest_step = -1

    @property
    def figure(self) -> Figure:
        """The one that is shown."""
        return self.figures[self.chosen % len(self.figures)]

    @property
    def several(self) -> bool:
        return len(self.figures) > 1

    def next_figure(self) -> None:
        """Switch to the next one that the run has."""
        state = self.view.state if self.view is not None else None
        for _ in self.figures:
            self.chosen = (self.chosen + 1) % len(self.figures)
            newest = state.series.newest if state is not None else None
            if state is None or newest is None or self.figure.value(newest, state) is not None:
                break
        self.redraw()

    def natural_height(self, width: int) -> int:
        return 8

    def inputs(self, view: View) -> object:
        return super().inputs(view), view.lens, view.earlier

    def accept(self, view: View) -> None:
        newest = view.state.series.newest
        value = self.figure.value(newest, view.state) if newest is not None else None
        title = " ".join(word for word in (self.key, self.figure.title) if word)
        title += f"  {self.figure.text(value)}" if value is not None else ""
        if len(self.figures) > 1 and self.has_focus:
            title += f" · g: figure {self.chosen + 1} of {len(self.figures)}"
        self.entitle(title + self._readout(view) + ("  log" if view.lens.log else ""))

    def _readout(self, view: View) -> str:
        """The values at the cursor."""
        cursor = view.lens.cursor
        if cursor is None:
            return ""
        points = [point for point in view.state.series if self.figure.value(point, view.state) is not None]
        if not points:
            return ""
        place = min(range(len(points)), key=lambda at: abs(points[at].step - cursor))
        value = self.figure.value(points[place], view.state)
        text = f" │ step {points[place].step:,}: {self.figure.text(value)}" if value is not None else ""
        if text and view.lens.smooth and not self.figure.stepped:
            smoothed = smooth([self.figure.value(point, view.state) for point in points])[place]
            text += f", smoothed {self.figure.text(smoothed)}" if smoothed is not None else ""
        return text

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        state, palette = view.state, view.palette
        key = (
            self._newest(view, width),
            state.revision((*BESIDE_STEPS, *RARE)),
            (width, height),
            self.chosen,
            palette,
            view.stale,
            view.lens,
            view.earlier,
        )
        if key == self._drawn_key:
            return self._drawn.rows
        series = list(state.series)
        evaluations = state.evaluations if self.figure.evaluated else Evaluations()
        marks = step_marks(state) if height >= 6 else []
        muted = palette.style("muted")
        legend = evaluation_rows(
            evaluations, width, muted if view.stale else palette.plot("evaluation"), 2 if height >= 10 else height >= 4
        )
        curves = self._curves(view, series, evaluations)
        look = Look(
            faint=muted,
            grid=palette.style("border"),
            cursor_style=palette.style("accent"),
            label=self.figure.tick,
            window=view.lens.window(extent(state)) if series else None,
            log=view.lens.log,
            marks=[AxisMark(mark.step, MARKS[mark.kind][0], palette.style(MARKS[mark.kind][1])) for mark in marks],
            cursor=view.lens.cursor,
        )
        drawn = draw_plot(curves, width, height - len(legend), look)
        self._legend = len(legend)
        self._drawn = replace(drawn, rows=[*legend, *drawn.rows])
        self._drawn_key = key
        return self._drawn.rows

    def _newest(self, view: View, width: int) -> int:
        """The newest step that is drawn: another one only if the plot has moved on by a cell since. Until then the
        title alone has the newest value."""
        newest = view.state.series.newest
        if newest is None:
            return -1
        first, last = view.lens.window(extent(view.state))
        cell = (last - first) / max(1, width)
        if not 0 <= newest.step - self._newest_step < cell:
            self._newest_step = newest.step
        return self._newest_step

    def _curves(self, view: View, series: list[StepResult], evaluations: Evaluations) -> list[Curve]:
        state, palette, lens = view.state, view.palette, view.lens
        points = [(float(point.step), self.figure.value(point, state)) for point in series]
        line = palette.style("muted") if view.stale else palette.plot(self.figure.color)
        curves = []
        if self.figure.evaluated and lens.overlay:
            for earlier in view.earlier:
                there = list(zip(earlier.steps, earlier.smoothed, strict=True))
                curves.append(Curve(there, palette.style("muted")))
        if lens.smooth and not self.figure.stepped:
            window = lens.window(extent(state))
            inside = [(x, y) for x, y in points if window[0] <= x <= window[1]]
            values = smooth([y for _, y in inside])
            smoothed_points = [(x, value) for (x, _), value in zip(inside, values, strict=True)]
            edges = envelope([y for _, y in inside], values)
            band = [(x, low, high) for (x, _), (low, high) in zip(inside, edges, strict=True)]
            curves.append(Curve(smoothed_points, line, band, palette.plot_band(self.figure.color)))
        else:
            curves.append(Curve(points, line))
        marked = [(float(one.step), one.loss) for one in evaluations if one.loss is not None]
        if marked:
            best = evaluations.best
            style = palette.style("muted") if view.stale else palette.plot("evaluation")
            curves.append(Curve(marked, style, marked=True, best=float(best.step) if best is not None else None))
        return curves

    # ---- the lens: keys and mouse ----------------------------------------------------------------------------------
    def zoom_by(self, factor: float) -> None:
        """Show fewer steps, or more."""
        if self.view is not None:
            self.post_message(self.LensChanged(self.view.lens.zoomed(factor, extent(self.view.state))))

    def pan_by(self, share: float) -> None:
        """Show earlier or later steps."""
        if self.view is not None:
            self.post_message(self.LensChanged(self.view.lens.panned(share, extent(self.view.state))))

    def move_cursor(self, by: int) -> None:
        """Move the cursor."""
        if self.view is not None:
            steps = [point.step for point in self.view.state.series]
            self.post_message(self.LensChanged(self.view.lens.moved(by, steps)))

    def show_whole(self) -> None:
        """Show all steps, without a cursor."""
        if self.view is not None:
            self.post_message(self.LensChanged(replace(self.view.lens, cursor=None, first=None, last=None)))

    def _step_at(self, event: events.MouseEvent) -> int | None:
        offset = event.get_content_offset(self)
        if self.view is None or self._drawn.x is None or offset is None or offset.x < self._drawn.left:
            return None
        wanted = self._drawn.x.value(2 * (offset.x - self._drawn.left))
        steps = [point.step for point in self.view.state.series]
        return min(steps, key=lambda step: abs(step - wanted)) if steps else None

    def on_click(self, event: events.Click) -> None:
        step = self._step_at(event)
        if step is not None and self.view is not None:
            self.post_message(self.LensChanged(replace(self.view.lens, cursor=step)))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.zoom_by(WHEEL)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.zoom_by(1 / WHEEL)


class PerplexityPanel(PlotPanel):
    """The perplexity of the evaluations."""

    def __init__(self, *, id: str) -> None:
        figure = Figure(PERPLEXITY, "evaluation", lambda point, _: None, perplexity_text)
        super().__init__("", (figure,), id=id)

    def accept(self, view: View) -> None:
        super().accept(view)
        newest = view.state.evaluations.newest
        text = f"  {perplexity_text(perplexity(newest.loss))}" if newest is not None else ""
        self.entitle(f"evaluation perplexity{text}" + ("  log" if view.lens.log else ""))

    def _curves(self, view: View, series: list[StepResult], evaluations: Evaluations) -> list[Curve]:
        there = view.state.evaluations
        points = [(float(one.step), perplexity(one.loss)) for one in there if one.loss is not None]
        style = view.palette.style("muted") if view.stale else view.palette.plot("evaluation")
        best = there.best
        return [Curve(points, style, marked=True, best=float(best.step) if best is not None else None)]
