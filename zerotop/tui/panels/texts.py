"""The evaluations of a run as a list, and what the model wrote at one of them."""

from __future__ import annotations

import textwrap

from runtime.wire.finetuning import Evaluation
from zerotop.clean import clean
from zerotop.format import figure_text, perplexity_text
from zerotop.state.evaluations import perplexity
from zerotop.state.run import RunState
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.plot import BEST_MARK
from zerotop.tui.widgets.textlines import TextLines


def why_no_texts(state: RunState) -> str:
    """Why there is nothing to show."""
    if not len(state.evaluations):
        return "no evaluation yet: zerotop.evaluation in the config asks for them"
    return "no texts: zerotop.evaluation.prompts in the config has the prompts to continue"


class EvaluationList(TextLines):
    """Step, loss and perplexity of each evaluation, newest first."""

    READS = ("evaluation",)
    shown_step: int | None = None
    """The step whose texts are shown."""
    _sought: int | None = None

    def subject(self, view: View) -> object:
        return "evaluations"

    def details(self, view: View) -> object:
        return (view.state.evaluations.newest, len(view.state.evaluations), self.shown_step)

    def accept(self, view: View) -> None:
        self.entitle(f"evaluations · {len(view.state.evaluations)}")
        super().accept(view)
        self._keep_in_sight()

    def _keep_in_sight(self) -> None:
        """Scroll if the evaluation that is shown has changed and its line is out of sight."""
        if self.shown_step == self._sought or self.view is None:
            return
        self._sought = self.shown_step
        steps = [point.step for point in reversed(list(self.view.state.evaluations))]
        height = self.scrollable_content_region.height
        if self.shown_step in steps and height:
            line = steps.index(self.shown_step) + 1
            top = self.scroll_offset.y
            if not top <= line < top + height:
                self.scroll_to(y=max(0, line - height // 2), animate=False, immediate=True, force=True)

    def make_rows(self, view: View, width: int) -> list[Row]:
        palette, evaluations = view.palette, view.state.evaluations
        muted, best = palette.style("muted"), evaluations.best
        if not len(evaluations):
            return [Row().add("none yet", muted)]
        head = Row().gap(2).cell("step", 9, muted, right=True).cell("loss", 10, muted, right=True)
        rows = [head.cell("perplexity", 12, muted, right=True)]
        for point in reversed(list(evaluations)):
            here = point.step == self.shown_step
            style = palette.style("primary", bold=True) if here else PLAIN if point.generations else muted
            row = Row().add("▌ " if here else "  ", style).cell(f"{point.step:,}", 9, style, right=True)
            row.cell(figure_text(point.loss), 10, style, right=True)
            row.cell(perplexity_text(perplexity(point.loss)), 12, style, right=True)
            if best is not None and best.step == point.step:
                row.gap(2).add(f"{BEST_MARK} best", palette.plot("evaluation"))
            rows.append(row)
        return rows


class TextPanel(TextLines):
    """The prompts, and what the model made of them, at one evaluation."""

    READS = ("evaluation",)
    step: int | None = None
    """The step of the evaluation; None: the newest one that has texts."""

    def evaluation(self, state: RunState) -> Evaluation | None:
        """The one that is shown."""
        there = state.evaluations.with_texts
        if self.step is None:
            return there[-1] if there else None
        return next((point for point in reversed(there) if point.step <= self.step), there[0] if there else None)

    def subject(self, view: View) -> object:
        return self.evaluation(view.state) or why_no_texts(view.state)

    def accept(self, view: View) -> None:
        shown, evaluations = self.evaluation(view.state), view.state.evaluations
        title = "texts"
        if shown is not None:
            there = evaluations.with_texts
            number = next((at for at, point in enumerate(there, 1) if point.step == shown.step), 0)
            title += f" {number} of {len(there)} · step {shown.step:,}"
            if shown.loss is not None:
                title += f" · loss {figure_text(shown.loss)}, perplexity {perplexity_text(perplexity(shown.loss))}"
            if evaluations.best is not None and evaluations.best.step == shown.step:
                title += f" · {BEST_MARK} best"
        self.entitle(title)
        super().accept(view)

    def make_rows(self, view: View, width: int) -> list[Row]:
        palette, shown = view.palette, self.evaluation(view.state)
        muted = palette.style("muted")
        if shown is None:
            return [Row().add(line, muted) for line in textwrap.wrap(why_no_texts(view.state), width)]
        rows: list[Row] = []
        for text in shown.generations:
            if rows:
                rows.append(Row())
            rows += [Row().add("▌ ", palette.plot("evaluation")).add(line, muted) for line in _wrap(text.prompt, width)]
            rows += [Row().gap(2).add(line) for line in _wrap(text.text, width) or ["(nothing)"]]
        return rows


def _wrap(text: str, width: int) -> list[str]:
    return [
        piece
        for line in clean(text).strip().splitlines()
        for piece in textwrap.wrap(line, max(20, width - 2), replace_whitespace=False) or [""]
    ]
