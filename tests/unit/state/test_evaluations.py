"""Evaluations and data reports in the state of a run: late screens, replayed steps, bounds."""

from __future__ import annotations

import math

import pytest

from runtime.wire.base import Message
from runtime.wire.codec import decode_snapshot, encode
from runtime.wire.finetuning import Generation
from runtime.wire.messages import RunStatus, Snapshot
from tests.harness.fakehub import hello, step_result
from tests.harness.finetuning import data_report, evaluation
from zerotop.state.evaluations import (
    CHARACTERS_KEPT,
    POINTS_KEPT,
    TEXTS_KEPT,
    Evaluations,
    evaluation_text,
    perplexity,
)
from zerotop.state.frozen_view import freeze
from zerotop.state.run import RunState


def folded(*messages: Message) -> RunState:
    state = RunState()
    state.apply_all([RunStatus(name="q1", state="running", attempt=1), hello(), *messages], 1)
    return state


def late(state: RunState) -> RunState:
    """The state of a screen that gets the snapshot of `state`, as a frame."""
    frame = encode(Snapshot(hub_seq=1, now_ns=1, wall_s=1, messages=state.snapshot_messages()))
    screen = RunState()
    screen.apply_snapshot(decode_snapshot(frame))
    return screen


def steps(evaluations: Evaluations) -> list[int]:
    return [point.step for point in evaluations]


def test_a_late_screen_sees_both_reports_all_evaluations_and_the_texts() -> None:
    state = folded(data_report(), data_report("evaluation"), *(evaluation(step) for step in range(0, 200, 25)))
    for seen in (state, late(state)):
        assert seen.data == {"train": data_report(), "evaluation": data_report("evaluation")}
        assert steps(seen.evaluations) == list(range(0, 200, 25))
        assert seen.evaluations.newest == evaluation(175)
        assert seen.evaluations.best is not None and seen.evaluations.best.step == 150
        assert [point.step for point in seen.evaluations.with_texts] == list(range(0, 200, 25))


def test_the_best_is_the_first_of_the_lowest_losses_that_are_numbers() -> None:
    evaluations = Evaluations()
    assert evaluations.best is None and evaluations.newest is None
    for step, loss in enumerate([math.nan, 3.0, 2.0, 2.0, math.inf, 2.5]):
        evaluations.add(evaluation(step, loss))
    assert evaluations.best is not None and evaluations.best.step == 2
    without = Evaluations()
    without.add(evaluation(0).model_copy(update={"loss": None}))
    assert without.best is None


def test_replayed_evaluations_are_replaced() -> None:
    state = folded(*(evaluation(step, 3 - step / 100) for step in (0, 50, 100, 150)))
    state.apply(RunStatus(name="q1", state="restarting", attempt=2))
    assert steps(state.evaluations) == [0, 50, 100, 150]
    state.apply(hello(attempt=2, start_step=100))
    assert steps(state.evaluations) == [0, 50, 100]
    state.apply(evaluation(150, 2.9))
    assert [point.loss for point in state.evaluations] == [3.0, 2.5, 2.0, 2.9]
    assert state.evaluations.best is not None and state.evaluations.best.step == 100


def test_evaluations_are_cut_also_where_a_step_arrives_before_the_hello() -> None:
    state = folded(*(evaluation(step) for step in (0, 50, 100)))
    state.apply(RunStatus(name="q1", state="restarting", attempt=2))
    state.apply(step_result(0, 51))
    state.apply(hello(attempt=2, start_step=50))
    assert steps(state.evaluations) == [0, 50]


def test_the_data_of_an_attempt_stays_until_the_next_one_reports() -> None:
    state = folded(data_report(), data_report("evaluation"))
    state.apply(RunStatus(name="q1", state="restarting", attempt=2))
    state.apply(hello(attempt=2))
    assert set(state.data) == {"train", "evaluation"}
    state.apply(data_report(rows=9))
    assert set(state.data) == {"train"} and state.data["train"].rows == 9


def test_a_long_run_keeps_the_first_the_best_and_the_newest() -> None:
    evaluations = Evaluations()
    for step in range(5 * POINTS_KEPT):
        evaluations.add(evaluation(step, 1.0 if step == 777 else 2.0, texts=False))
        assert len(evaluations) <= POINTS_KEPT
    kept = steps(evaluations)
    assert len(kept) > POINTS_KEPT // 4 and kept == sorted(kept)
    assert kept[0] == 0 and kept[-1] == 5 * POINTS_KEPT - 1
    assert evaluations.best is not None and evaluations.best.step == 777


@pytest.mark.parametrize("characters", [10, CHARACTERS_KEPT // 8, CHARACTERS_KEPT])
def test_texts_of_few_evaluations_are_kept_within_a_bound(characters: int) -> None:
    evaluations = Evaluations()
    texts = [Generation(prompt="p", text="x" * characters)]
    for step in range(200):
        loss = 1.0 if step == 77 else 2.0
        evaluations.add(evaluation(step, loss, texts=False).model_copy(update={"generations": texts}))
        there = evaluations.with_texts
        assert len(there) <= TEXTS_KEPT
        assert sum(len(text.text) for point in there for text in point.generations) <= CHARACTERS_KEPT + characters
        assert there[-1].step == step
    assert len(evaluations) == 200
    if characters == 10:
        assert len(there) > TEXTS_KEPT // 4 and there[0].step == 0 and 77 in [point.step for point in there]


def test_a_frozen_view_keeps_its_evaluations_and_data() -> None:
    state = folded(data_report(), evaluation(0))
    still = freeze(state)
    state.apply_all([data_report(rows=1), evaluation(25)], 2)
    assert steps(still.evaluations) == [0] and still.data["train"].rows == 7168


def test_an_evaluation_in_words() -> None:
    newest, best = evaluation(50, 2.0), evaluation(20, 1.5)
    assert evaluation_text(newest, best) == (
        "evaluation at step 50: loss 2.0000, perplexity 7.389; best 1.5000 at step 20"
    )
    assert evaluation_text(best, best) == "evaluation at step 20: loss 1.5000, perplexity 4.482, the best so far"
    assert evaluation_text(evaluation(5, math.nan), None) == "evaluation at step 5: loss NaN, perplexity NaN"
    assert evaluation_text(newest.model_copy(update={"loss": None}), None) == "evaluation at step 50: 2 texts"


def test_perplexity_of_any_loss() -> None:
    assert perplexity(None) is None
    assert perplexity(0.0) == 1.0 and perplexity(1e9) == math.inf and perplexity(-1e9) == 0.0
    assert math.isnan(perplexity(math.nan) or 0.0) and perplexity(math.inf) == math.inf
