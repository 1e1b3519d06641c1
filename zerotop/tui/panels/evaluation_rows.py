"""The newest evaluation and the best one in words, above the plot of the loss."""

from __future__ import annotations

from rich.style import Style

from runtime.wire.finetuning import Evaluation
from zerotop.format import figure_text, perplexity_text
from zerotop.state.evaluations import Evaluations, perplexity
from zerotop.tui.widgets.lines import Row
from zerotop.tui.widgets.plot import BEST_MARK, MARK


def evaluation_rows(evaluations: Evaluations, width: int, style: Style, lines: int) -> list[Row]:
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
