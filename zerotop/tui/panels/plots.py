"""Figures over steps: loss, gradient norm or learning rate; throughput or step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.style import Style

from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import StepResult
from zerotop.format import count_text, figure_text, ms_text, perplexity_text
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
        legend = _evaluation_rows(evaluations, width, second, lines=2 if height >= 10 else 1 if height >= 4 else 0)
        marked = _marked(evaluations, second)
        body = height - len(legend)
        plot = plot_rows(points, width, body, self.figure.text, line, palette.style("muted"), marked)
        self._drawn = [*legend, *plot]
        self._drawn_key = key
        return self._drawn


def _marked(evaluations: Evaluations, style: Style) -> Marked | None:
    """The evaluation loss as a second line; None without one."""
    points = [(float(point.step), point.loss) for point in evaluations if point.loss is not None]
    best = evaluations.best
    return Marked(points, style, float(best.step) if best is not None else None) if points else None


def _evaluation_rows(evaluations: Evaluations, width: int, style: Style, lines: int) -> list[Row]:
    """The newest evaluation and the best one, in at most so many lines, and in as many words as there is room for."""
    newest, best = evaluations.newest, evaluations.best
    if newest is None or newest.loss is None or not lines:
        return []
    now = _loss_texts("evaluation", newest)
    mark = MARK
    if best is None:
        choices = [[text] for text in now]
    elif best.step == newest.step:
        mark = BEST_MARK
        choices = [[f"{now[0]} · the best so far"], *([f"{text} · best"] for text in now)]
    else:
        low = [f"{BEST_MARK} {text}" for text in _loss_texts("best", best)]
        where, at = f" at step {best.step}", f" at {best.step}"
        choices = [[f"{now[0]}  {low[0]}{where}"]]
        if lines > 1:
            choices += [
                [now[0], low[0] + where],
                [now[1], low[1] + where],
                [now[1], low[1] + at],
                [now[2], low[2] + at],
            ]
        choices += [[f"{now[1]}  {low[1]}{at}"], [f"{now[2]}  {low[2]}{at}"]]
        choices += [[f"{now[2]}  {BEST_MARK} {figure_text(best.loss)}{at}"], [now[2]]]
    for texts in choices:
        if max(len(text) for text in texts) + 2 <= width:
            return [Row().add(f"{mark} {texts[0]}", style), *(Row().add(text, style) for text in texts[1:])]
    return []


def _loss_texts(name: str, evaluation: Evaluation) -> list[str]:
    """Loss and perplexity, from long to short."""
    loss, ppl = figure_text(evaluation.loss), perplexity_text(perplexity(evaluation.loss))
    name_short = "eval" if name == "evaluation" else name
    return [f"{name} {loss}, perplexity {ppl}", f"{name_short} {loss}, ppl {ppl}", f"{name_short} {loss}"]
