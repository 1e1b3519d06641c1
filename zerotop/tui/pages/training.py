"""5: how the training goes: loss, evaluations, gradient norm, learning rate, speed."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget

from zerotop.tui.pages.base import Page
from zerotop.tui.panels.plots import (
    LOSS,
    MFU,
    NORM,
    RATE,
    SCALE,
    STEP_TIME,
    THROUGHPUT,
    WAIT,
    Figure,
    PerplexityPanel,
    PlotPanel,
)
from zerotop.tui.view import View

PLOTS: tuple[tuple[str, Figure], ...] = (
    ("plot-norm", NORM),
    ("plot-rate", RATE),
    ("plot-scale", SCALE),
    ("plot-speed", THROUGHPUT),
    ("plot-step", STEP_TIME),
    ("plot-wait", WAIT),
    ("plot-mfu", MFU),
)
LOW, NARROW = 30, 110
"""A page lower or narrower than this shows fewer plots."""


class TrainingPage(Page):
    """All curves share the steps that they show and the cursor."""

    KEY: ClassVar[str] = "5"
    NAME: ClassVar[str] = "Training"
    COMPANION: ClassVar[str] = "1"

    def __init__(self) -> None:
        super().__init__(id="training")

    def compose(self) -> ComposeResult:
        with Horizontal(id="training-loss"):
            yield PlotPanel("", (LOSS,), id="plot-loss")
            yield PerplexityPanel(id="plot-perplexity")
        with Horizontal(id="training-steps"):
            for name, figure in PLOTS[:3]:
                yield PlotPanel("", (figure,), id=name)
        with Horizontal(id="training-speed"):
            for name, figure in PLOTS[3:]:
                yield PlotPanel("", (figure,), id=name)

    def first_focus(self) -> Widget | None:
        return self.query_one("#plot-loss")

    def show_view(self, view: View) -> None:
        """Figures that the run does not have take no room."""
        super().show_view(view)
        newest = view.state.series.newest
        wide = self.size.width >= NARROW
        shown = 0
        for number, (name, figure) in enumerate(PLOTS):
            there = newest is not None and figure.value(newest, view.state) is not None
            if number == 3:
                shown = 0
            wanted = (there or figure in (NORM, RATE, THROUGHPUT, STEP_TIME)) and (wide or shown < 2)
            shown += wanted
            self._show(name, wanted)
        self._show("plot-perplexity", wide and view.state.evaluations.best is not None)
        self._show("training-speed", self.size.height >= LOW or not self.size.height)

    def _show(self, name: str, wanted: bool) -> None:
        self.query_one(f"#{name}").set_class(not wanted, "-absent")
