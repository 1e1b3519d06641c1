"""Figures over steps: loss, gradient norm or learning rate; throughput or step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.style import Style

from runtime.wire.messages import StepResult
from zerotop.format import count_text, figure_text, ms_text
from zerotop.state.evaluations import Evaluations, perplexity
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row
from zerotop.tui.widgets.plot import BEST_MARK, MARK, Marked, plot_rows


@dataclass(frozen=True)
class Figure:
    """`value(point, world_size)` is None where the step has no such figure."""

    title: str
    color: str  # of [plots]
    value: Callable[[StepResult, int], float | None]
    text: Callable[[float], str]
    evaluated: bool = False
    """Whether the evaluation loss belongs into the same plot."""


def _throughput(point: StepResult, world_size: int) -> float | None:
    # Series keeps one rank's steps. All ranks take the same steps with equal micro-batches, so the run's rate is that
    # many times its own.
    return None if point.tokens_per_s is None else point.tokens_per_s * max(1, world_size)


LEARNING = (
    Figure("loss", "loss", lambda point, _: point.loss, figure_text, evaluated=True),
    Figure("gradient norm", "norm", lambda point, _: point.grad_norm, figure_text),
    Figure("learning rate", "norm", lambda point, _: point.lr, figure_text),
)
SPEED = (
    Figure("tokens/s", "throughput", _throughput, count_text),
    Figure("step time", "throughput", lambda point, _: point.step_ms, ms_text),
)


class PlotPanel(Panel, can_focus=True):
    """Plots one of `figures` at a time; `g` switches to the next."""

    def __init__(self, number: int, figures: tuple[Figure, ...], *, id: str) -> None:
        super().__init__(id=id)
        self.number = number
        self.figures = figures
        self.chosen = 0
        self._drawn: list[Row] = []
        self._drawn_key: tuple[object, ...] = ()

    @property
    def figure(self) -> Figure:
        """The one that is shown."""
        return self.figures[self.chosen]

    def next_figure(self) -> None:
        """Switch to the next one."""
        self.chosen = (self.chosen + 1) % len(self.figures)
        self.redraw()

    def natural_height(self, width: int) -> int:
        return 8

    def accept(self, view: View) -> None:
        super().accept(view)
        newest = list(view.state.series)[-1:]
        value = self.figure.value(newest[0], view.state.world_size) if newest else None
        title = f"{self.number} {self.figure.title}" + (f"  {self.figure.text(value)}" if value is not None else "")
        self.entitle(title)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette, series = view.palette, list(view.state.series)
        evaluations = view.state.evaluations if self.figure.evaluated else Evaluations()
        key = (
            series[-1] if series else None,
            len(series),
            evaluations.newest,
            len(evaluations),
            (width, height),
            self.chosen,
            palette.name,
            view.stale,
        )
        if key == self._drawn_key:
            return self._drawn  # between two steps there is nothing new to plot
        world_size = view.state.world_size
        points = [(float(point.step), self.figure.value(point, world_size)) for point in series]
        line = palette.style("muted") if view.stale else palette.plot(self.figure.color)
        second = palette.style("muted") if view.stale else palette.plot("evaluation")
        legend = _evaluation_row(evaluations, width, second) if height >= 4 else None
        marked = _marked(evaluations, second)
        body = height - (legend is not None)
        self._drawn = plot_rows(points, width, body, self.figure.text, line, palette.style("muted"), marked)
        if legend is not None:
            self._drawn.insert(0, legend)
        self._drawn_key = key
        return self._drawn


def _marked(evaluations: Evaluations, style: Style) -> Marked | None:
    """The evaluation loss as a second line; None without one."""
    points = [(float(point.step), point.loss) for point in evaluations if point.loss is not None]
    best = evaluations.best
    return Marked(points, style, float(best.step) if best is not None else None) if points else None


def _evaluation_row(evaluations: Evaluations, width: int, style: Style) -> Row | None:
    """The newest evaluation and the best one, in as many words as there is room for."""
    newest, best = evaluations.newest, evaluations.best
    if newest is None or newest.loss is None:
        return None
    now, ppl = figure_text(newest.loss), figure_text(perplexity(newest.loss))
    texts = [f"evaluation {now}, perplexity {ppl}", f"eval {now}, ppl {ppl}", f"eval {now}"]
    if best is not None:
        low, at = figure_text(best.loss), best.step
        low_ppl = figure_text(perplexity(best.loss))
        if best.step == newest.step:
            more = [" · the best so far", " · best so far", " · best"]
            mark = BEST_MARK
        else:
            more = [
                f" · best {low}, perplexity {low_ppl} at step {at}",
                f" · {BEST_MARK} best {low}, ppl {low_ppl} at {at}",
                f" · {BEST_MARK} {low} at {at}",
            ]
            mark = MARK
        texts = [text + rest for text, rest in zip(texts, more, strict=True)] + texts[-1:]
    else:
        mark = MARK
    text = next((text for text in texts if len(text) + 2 <= width), None)
    return None if text is None else Row().add(f"{mark} {text}", style)
