"""Bus bandwidth per operation and size, and what a transfer usually takes."""

from __future__ import annotations

import pytest

from zerotop.state.bandwidth import BASELINE, KEYS_KEPT, NEEDED, WARM_UP, Bandwidth, bus_factor

MIB = 2**20


@pytest.mark.parametrize(
    ("op", "world", "factor"),
    [
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 2, 0.5),
        ("broadcast", 8, 1.0),
        ("all_reduce", 1, 0),
    ],
)
def test_bytes_on_a_link_per_byte_of_the_buffer(op: str, world: int, factor: float) -> None:
    assert bus_factor(op, world) == factor


def test_the_usual_time_is_known_after_some_transfers_and_then_stays() -> None:
    links = Bandwidth()
    usual = [links.add("all_gather", MIB, 1000 if k >= WARM_UP else 9000) for k in range(WARM_UP + BASELINE)]
    assert usual[WARM_UP + NEEDED - 2] is None and usual[-1] == 1000
    assert [links.add("all_gather", MIB, 5000) for _ in range(100)][-1] == 1000
    (kind,) = links.kinds()
    assert (kind.now_us, kind.best_us) == (5000, 1000)
    assert kind.bus_bytes_per_s(kind.now_us, 2) == pytest.approx(MIB / 2 / 0.005)
    assert kind.bus_bytes_per_s(None, 2) is None


def test_kinds_are_bounded_and_a_copy_is_independent() -> None:
    links = Bandwidth()
    for size in range(KEYS_KEPT + 50):
        links.add("all_reduce", size, 10)
    copied = links.copy()
    links.add("all_reduce", KEYS_KEPT + 49, 10)
    assert len(links.kinds()) == KEYS_KEPT
    assert max(kind.count for kind in links.kinds()) == 2 and max(kind.count for kind in copied.kinds()) == 1


def test_a_link_that_becomes_slow_before_the_baseline_is_complete_does_not_pass_for_usual() -> None:
    links = Bandwidth()
    for _ in range(WARM_UP + NEEDED):
        links.add("all_gather", MIB, 1000)
    assert [links.add("all_gather", MIB, 2500) for _ in range(4 * BASELINE)][-1] == 1000
    assert [links.add("all_gather", MIB, 1200) for _ in range(BASELINE)][-1] == 1200  # noise of a machine is usual


def test_groups_are_kept_apart() -> None:
    links = Bandwidth()
    links.add("all_reduce", MIB, 100)
    links.add("all_reduce", MIB, 9000, "tensor parallel")
    assert [(kind.group, kind.count) for kind in links.kinds()] == [("world", 1), ("tensor parallel", 1)]
