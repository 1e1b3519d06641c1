"""The evaluations of a run over its steps, and what the model wrote at some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from runtime.wire.finetuning import Evaluation
from zerotop.format import figure_text, perplexity_text

POINTS_KEPT = 1024
TEXTS_KEPT = 32
"""Evaluations whose generated texts are kept: the first, the best, the newest, and others evenly between them."""
CHARACTERS_KEPT = 2**20
"""Most characters of all these texts together, because every late screen is sent them."""


class Evaluations:
    """The evaluations by rising step. A step that is replayed after a restart replaces its evaluation.

    Beyond POINTS_KEPT, every second one is dropped, but never the first, the best or the newest. The texts of
    evaluations are dropped earlier, in the same way.
    """

    def __init__(self) -> None:
        self._points: list[Evaluation] = []

    def add(self, evaluation: Evaluation) -> None:
        """Take the result of one evaluation."""
        self.cut(evaluation.step - 1)
        self._points.append(evaluation)
        if len(self._points) > POINTS_KEPT:
            kept = _every_second(self._points, self._best_at())
            self._points = [self._points[at] for at in kept]
        self._drop_texts()

    def cut(self, step: int) -> None:
        """Drop the evaluations after `step`: a new attempt continues from there."""
        while self._points and self._points[-1].step > step:
            self._points.pop()

    def copy(self) -> Evaluations:
        """An independent copy."""
        other = Evaluations()
        other._points = list(self._points)
        return other

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def newest(self) -> Evaluation | None:
        """The one of the latest step."""
        return self._points[-1] if self._points else None

    @property
    def best(self) -> Evaluation | None:
        """The one with the lowest loss, the earliest of equals; None if none has a loss that is a number."""
        at = self._best_at()
        return None if at is None else self._points[at]

    @property
    def with_texts(self) -> list[Evaluation]:
        """Those whose generated texts are kept, oldest first."""
        return [point for point in self._points if point.generations]

    def messages(self) -> list[Evaluation]:
        """All of them, for a late screen."""
        return list(self._points)

    def _best_at(self) -> int | None:
        losses = [(point.loss, at) for at, point in enumerate(self._points) if _finite(point.loss)]
        return min(losses)[1] if losses else None

    def _drop_texts(self) -> None:
        best = self._best_at()
        while True:
            places = [at for at, point in enumerate(self._points) if point.generations]
            if len(places) <= 1 or (len(places) <= TEXTS_KEPT and self._characters(places) <= CHARACTERS_KEPT):
                return
            kept = _every_second(places, places.index(best) if best in places else None)
            if len(kept) == len(places):  # the first, the best and the newest alone are too large
                kept = [len(places) - 1]
            kept_places = {places[at] for at in kept}
            for at in places:
                if at not in kept_places:
                    self._points[at] = self._points[at].model_copy(update={"generations": []})

    def _characters(self, places: list[int]) -> int:
        texts = (text for at in places for text in self._points[at].generations)
        return sum(len(text.prompt) + len(text.text) for text in texts)


def perplexity(loss: float | None) -> float | None:
    """exp(loss), infinity beyond what a float holds; None without a loss."""
    if loss is None:
        return None
    return math.exp(loss) if not loss > 700 else math.inf


def evaluation_text(evaluation: Evaluation, best: Evaluation | None) -> str:
    """An evaluation in one line: its loss and perplexity, and the best one."""
    text = f"evaluation at step {evaluation.step}: "
    if evaluation.loss is None:
        return f"{text}{len(evaluation.generations)} texts"
    text += f"loss {figure_text(evaluation.loss)}, perplexity {perplexity_text(perplexity(evaluation.loss))}"
    if best is None:
        return text
    if best.step == evaluation.step:
        return f"{text}, the best so far"
    return f"{text}; best {figure_text(best.loss)} at step {best.step}"


def _every_second(items: list[Evaluation] | list[int], best: int | None) -> list[int]:
    """Indices of every second item, counted back from the newest, and of the first and the best."""
    last = len(items) - 1
    return [at for at in range(len(items)) if (last - at) % 2 == 0 or at in (0, best)]


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
