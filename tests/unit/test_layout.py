"""Properties of the shard arithmetic: every element has exactly one owner, whatever the sizes and the world."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from runtime.zero.layout import ALIGNMENT, Layout

shapes = st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=0, max_size=12)


def layout_of(sizes: list[list[int]], world: int) -> Layout:
    return Layout.of([(f"p{i}", shape, i % 3) for i, shape in enumerate(sorted(sizes))], world)


@given(shapes, st.integers(1, 9))
def test_ranges_tile_the_buffer(sizes, world):
    layout = layout_of(sizes, world)
    ends = [layout.range(rank) for rank in range(world)]
    assert ends[0][0] == 0 and ends[-1][1] == layout.numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert layout.range_numel % ALIGNMENT == 0
    assert 0 <= layout.numel - layout.used < world * ALIGNMENT


@given(shapes, st.integers(1, 9))
def test_slices_cover_every_parameter_element_exactly_once(sizes, world):
    layout = layout_of(sizes, world)
    owned: dict[str, list[tuple[int, int]]] = {slot.name: [] for slot in layout.slots}
    for rank in range(world):
        start, end = layout.range(rank)
        for part in layout.slices(start, end):
            assert part.range_start >= 0 and part.range_start + part.numel <= layout.range_numel
            owned[part.name].append((part.param_start, part.param_start + part.numel))
    for slot in layout.slots:
        parts = sorted(owned[slot.name])
        assert sum(high - low for low, high in parts) == slot.numel == math.prod(slot.shape)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


@given(shapes, st.integers(1, 9))
def test_segments_hold_one_group_each_and_no_padding(sizes, world):
    layout = layout_of(sizes, world)
    group_at = [slot.group for slot in layout.slots for _ in range(slot.numel)]
    covered = 0
    for rank in range(world):
        start, end = layout.range(rank)
        for segment in layout.segments(start, end):
            assert segment.start < segment.end
            assert set(group_at[start + segment.start : start + segment.end]) == {segment.group}
            covered += segment.end - segment.start
    assert covered == layout.used
