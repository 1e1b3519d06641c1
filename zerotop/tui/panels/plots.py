"""Figures over steps: loss, gradient norm or learning rate; throughput or step time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.wire.messages import StepResult
from zerotop.format import count_text, figure_text, ms_text
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row
from zerotop.tui.widgets.plot import plot_rows


@dataclass(frozen=True)
class Figure:
    """`value(point, world_size)` is None where the step has no such figure."""

    title: str
    color: str  # of [plots]
    value: Callable[[StepResult, int], float | None]
    text: Callable[[float], str]


def _throughput(point: StepResult, world_size: int) -> float | None:
    # Series keeps one rank's steps. All ranks take the same steps with equal micro-batches, so the run's rate is that
    # many times its own.
    return None if point.tokens_per_s is None else point.tokens_per_s * max(1, world_size)


LEARNING = (
    Figure("loss", "loss", lambda point, _: point.loss, figure_text),
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
        key = (series[-1] if series else None, len(series), width, height, self.chosen, palette.name, view.stale)
        if key == self._drawn_key:
            return self._drawn  # between two steps there is nothing new to plot
        world_size = view.state.world_size
        points = [(float(point.step), self.figure.value(point, world_size)) for point in series]
        line = palette.style("muted") if view.stale else palette.plot(self.figure.color)
        self._drawn = plot_rows(points, width, height, self.figure.text, line, palette.style("muted"))
        self._drawn_key = key
        return self._drawn
