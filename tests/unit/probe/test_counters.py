"""Rates by differences of counters that wrap, start again, or are read twice."""

from __future__ import annotations

import math

import pytest

from zerotop.probe.counters import CounterRate, pcie_bytes_per_s

GEN3_X1 = pcie_bytes_per_s(3, 1)
WRAP = 2**32


def test_the_rate_is_the_difference_over_the_time_between_the_readings() -> None:
    rate = CounterRate()
    assert rate.add(1_000, 10.0) is None
    assert rate.add(5_000, 12.0) == 2_000
    assert rate.add(5_000, 13.0) == 0


def test_a_reading_of_the_same_moment_leaves_the_rate_as_it_was() -> None:
    rate = CounterRate()
    rate.add(0, 1.0)
    assert rate.add(3_000, 2.0) == 3_000
    assert rate.add(3_000, 2.0) == 3_000
    assert rate.add(4_000, 3.0) == 1_000


@pytest.mark.parametrize("narrow", [True, False])
def test_a_counter_that_wraps_at_32_bits_goes_on(narrow: bool) -> None:
    rate = CounterRate()
    rate.add(WRAP - 1_000, 1.0, narrow=narrow, most_per_s=GEN3_X1)
    assert rate.add(500, 2.0, narrow=narrow, most_per_s=GEN3_X1) == 1_500


def test_a_counter_that_starts_again_has_no_rate_once_then_goes_on() -> None:
    rate = CounterRate()
    rate.add(7 * WRAP, 1.0, most_per_s=GEN3_X1)
    assert rate.add(100, 2.0, most_per_s=GEN3_X1) is None
    assert rate.add(300, 3.0, most_per_s=GEN3_X1) == 200
    # Below 2^32 it could have wrapped, but the link can't carry that much.
    assert rate.add(WRAP // 2, 4.0, most_per_s=GEN3_X1) is None
    assert rate.add(0, 5.0, most_per_s=GEN3_X1) is None


def test_a_narrow_counter_on_a_link_that_fills_it_between_two_readings_tells_nothing() -> None:
    rate, gen5 = CounterRate(), pcie_bytes_per_s(5, 16)
    assert gen5 == pytest.approx(63e9, rel=0.01)
    rate.add(0, 1.0, narrow=True, most_per_s=gen5)
    assert rate.add(10**6, 2.0, narrow=True, most_per_s=gen5) is None
    assert rate.add(2 * 10**6, 2.01, narrow=True, most_per_s=gen5) == pytest.approx(1e8)


def test_more_than_the_link_can_carry_is_no_rate() -> None:
    rate = CounterRate()
    rate.add(0, 1.0, most_per_s=GEN3_X1)
    assert rate.add(10**12, 2.0, most_per_s=GEN3_X1) is None


def test_what_a_link_carries_is_unknown_without_its_generation() -> None:
    assert math.isinf(pcie_bytes_per_s(None, 16)) and math.isinf(pcie_bytes_per_s(99, 16))
