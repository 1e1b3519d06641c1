"""The curve of a run: bounded however long the run is, and corrected after a restart."""

from __future__ import annotations

import math

import pytest

from tests.unit.state.test_run import result
from zerotop.state.series import POINTS_KEPT, Series
from zerotop.state.smoothing import smooth, smooth_last


def test_a_long_series_keeps_the_whole_run_in_bounded_memory() -> None:
    series = Series()
    for step in range(1, 20_001):
        series.add(result(step))
        assert len(series) <= POINTS_KEPT + 1
    steps = [point.step for point in series]
    assert steps == sorted(set(steps)) and steps[-1] == 20_000 and steps[0] <= 2 * series.stride
    assert len(steps) > POINTS_KEPT // 3


def test_a_resumed_attempt_takes_back_what_never_happened() -> None:
    series = Series()
    for step in range(1, 31):
        series.add(result(step))
    series.add(result(21, loss=9.0))
    assert [point.step for point in series] == list(range(1, 22)) and list(series)[-1].loss == 9.0


def test_throughput_is_the_sum_over_ranks_and_points_are_one_ranks() -> None:
    series = Series()
    for rank in (0, 1, 2):
        series.add(result(1, rank))
    assert len(series) == 1 and series.tokens_per_s == 150.0


@pytest.mark.parametrize("count", [0, 1, 5, POINTS_KEPT, 2 * POINTS_KEPT + 3])
def test_the_newest_points_are_found_without_the_others(count: int) -> None:
    series = Series()
    for step in range(1, count + 1):
        series.add(result(step))
    for wanted in (1, 2, 20, 5000):
        assert series.recent(wanted) == list(series)[-wanted:]
    assert (series.first, series.newest) == (next(iter(series), None), next(iter(list(series)[::-1]), None))


@pytest.mark.parametrize("count", [0, 1, 23, 24, 300])
def test_the_last_smoothed_value_is_found_without_the_others(count: int) -> None:
    values = [math.sin(at) + at / 50 for at in range(count)]
    expected = smooth(values)[-1] if values else None
    assert smooth_last(values) == (None if expected is None else pytest.approx(expected))
