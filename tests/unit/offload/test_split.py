"""Who updates how much: the split that ends soonest, and what stays on the device."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.offload.split import Rates, device_share, measure
from runtime.plan.layout import kept_on_device


def seconds(rates: Rates, share: float) -> float:
    """Until both have finished, working beside one another."""
    if share in (0.0, 1.0):
        return 1 / (rates.gpu if share else rates.cpu)
    return max((1 - share) / rates.cpu_beside, share / rates.gpu_beside)


rate = st.floats(1e6, 1e11)


@given(rate, rate, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_no_other_split_ends_sooner(cpu, gpu, slower_cpu, slower_gpu):
    rates = Rates(cpu, gpu, cpu * slower_cpu, gpu * slower_gpu)
    best = seconds(rates, device_share(rates))
    assert all(best <= seconds(rates, share / 20) * (1 + 1e-9) for share in range(21))


def test_measuring_counts_what_is_done():
    done = []
    rates = measure(lambda: done.append("cpu"), lambda: lambda: done.append("gpu"), elements=1000)
    assert done.count("cpu") == done.count("gpu") >= 3
    assert all(value > 0 for value in rates)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.floats(0, 1))
@example([0, 1], 0.0)
def test_the_first_ranges_stay_as_near_to_the_ratio_as_can_be(sizes, ratio):
    stays = kept_on_device(sizes, ratio)
    assert stays == sorted(stays, reverse=True)
    kept = sum(size for size, stay in zip(sizes, stays, strict=True) if stay)
    assert abs(kept - (1 - ratio) * sum(sizes)) <= max(sizes) / 2 + 1e-6 * sum(sizes)


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, [False] * 3), (0.0, [True] * 3), (0.7, [True, False, False])])
def test_ratios_as_users_write_them(ratio, expected):
    assert kept_on_device([300, 300, 300], ratio) == expected
