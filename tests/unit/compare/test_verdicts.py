"""Verdicts: what is better, what is worse, and what is noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from runtime.wire.messages import StepResult
from zerotop.compare.curves import Point, RunCurves, points_of
from zerotop.compare.report import loss_table
from zerotop.compare.verdicts import Verdict, common_steps, judge, judge_loss, overall

STEPS = 400


def curves(
    name: str = "a",
    *,
    seed: int = 0,
    data: int = 0,
    shift: float = 0.0,
    noise: float = 0.0,
    step_ms: float = 100.0,
    peak: int = 2**30,
    steps: int = STEPS,
    loss: Callable[[int], float] | None = None,
    branch: tuple[str, int] | None = None,
) -> RunCurves:
    """A run on data of its own; runs on the same `data` see the same difficulty at each step."""
    difficulty, own = random.Random(data), random.Random(seed)
    points = []
    for step in range(1, steps + 1):
        value = 2 + 3 / math.sqrt(step) + difficulty.gauss(0, 0.2) + own.gauss(0, noise) + shift
        took = step_ms * own.uniform(0.95, 1.05)
        value = loss(step) if loss is not None else value
        points.append(Point(step, step * 0.1, step * 1024.0, value, 1.0, 1e-3, took, 1024 / took * 1000))
    of, at = branch or (None, None)
    return RunCurves(name, "finished", 2, tuple(points), {}, peak, "process", of, at)


def test_a_shift_on_the_same_data_is_seen_far_below_the_noise_of_the_curve() -> None:
    verdict = judge_loss(curves(), curves("b", shift=-0.02, noise=0.01, seed=1), 0.002)
    assert verdict.judgement == "better" and verdict.change == pytest.approx(-0.02 / 2.15, abs=0.004)
    assert judge_loss(curves(), curves("b", shift=0.02, noise=0.01, seed=1), 0.002).judgement == "worse"


def test_two_runs_on_other_data_are_within_noise() -> None:
    found = [judge_loss(curves(data=2 * n), curves("b", data=2 * n + 1), 0.002).judgement for n in range(60)]
    assert found.count("within noise") >= 57


def test_equal_runs_are_within_noise_and_a_difference_below_the_tolerance_is_none() -> None:
    assert judge_loss(curves(), curves("b"), 0.0).judgement == "within noise"
    assert judge_loss(curves(), curves("b", shift=0.003), 0.002).judgement == "within noise"
    assert judge_loss(curves(), curves("b", shift=0.003), 0.0001).judgement == "worse"


def test_too_few_common_steps_are_unknown() -> None:
    verdict = judge_loss(curves(), curves("b", steps=10), 0.002)
    assert verdict.judgement == "unknown" and "10 common steps are too few" in verdict.text


def test_a_run_whose_loss_is_not_finite_is_worse() -> None:
    broken = curves("b", loss=lambda step: 2.0 if step < 390 else math.nan)
    assert judge_loss(curves(), broken, 0.002).judgement == "worse"
    assert judge_loss(broken, curves("c"), 0.002).judgement == "better"


def test_the_trunk_of_a_branch_is_not_compared() -> None:
    a, b = curves(), curves("b", branch=("a", 380))
    assert [step for step, _, _ in common_steps(a, b)] == list(range(381, 401))
    assert [step for step, _, _ in common_steps(b, a)] == list(range(381, 401))
    assert len(common_steps(curves("c"), b)) == STEPS


def test_speed_and_memory() -> None:
    verdicts = judge(curves(), curves("b", step_ms=150, peak=2**30 + 2**28, seed=3))
    assert verdicts["speed"].judgement == "worse" and verdicts["memory"].judgement == "worse"
    verdicts = judge(curves(), curves("b", step_ms=80, peak=2**29, seed=3))
    assert verdicts["speed"].judgement == "better" and verdicts["memory"].judgement == "better"
    verdicts = judge(curves(), curves("b", step_ms=101, peak=2**30 + 1000, seed=3))
    assert {verdicts[name].judgement for name in ("speed", "memory")} == {"within noise"}
    assert judge(curves(), curves("b", steps=5))["speed"].judgement == "unknown"


def test_the_worst_decides() -> None:
    def made(*names: str) -> list[Verdict]:
        return [Verdict("loss", name, None, None, None, None, "") for name in names]  # type: ignore[arg-type]

    assert overall(made("better", "worse", "unknown")) == "worse"
    assert overall(made("better", "unknown")) == "unknown"
    assert overall(made("within noise", "better")) == "better"
    assert overall(made("within noise")) == "within noise" == overall([])


def row(wall_s: float, attempt: int, step: int, loss: float = 1.0) -> tuple[float, int, StepResult]:
    one = StepResult(rank=0, step=step, loss=loss, lr=0.1, grad_norm=None, step_ms=2000.0, tokens_per_s=50.0, end_ns=0)
    return wall_s, attempt, one


def test_the_time_of_a_curve_is_that_of_training_and_replayed_steps_count_once() -> None:
    rows = [row(10, 1, 1), row(12, 1, 2), row(14, 1, 3), row(5000, 2, 2, loss=0.5), row(5002, 2, 3)]
    points = points_of(rows, world_size=2, tokens_per_step=100)
    assert [(point.step, point.loss) for point in points] == [(1, 1.0), (2, 0.5), (3, 1.0)]
    assert [point.time_s for point in points] == [2, 8, 10]  # the replayed steps cost time
    assert [point.tokens for point in points] == [100, 200, 300] and points[0].tokens_per_s == 100.0


def test_losses_at_the_same_step_time_and_tokens() -> None:
    slow = curves("b", step_ms=200, steps=200)
    assert [place for place, _, _ in loss_table(curves(), slow, "step")] == [26, 51, 76, 100, 125, 150, 175, 200]
    for axis in ("step", "time", "tokens"):
        assert all(a is not None and b is not None for _, a, b in loss_table(curves(), slow, axis))  # type: ignore[arg-type]
    assert loss_table(curves(), curves("b", steps=0), "step") == []
