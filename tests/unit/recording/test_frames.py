"""Frames: which moments a recording has, and how they are numbered."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerotop.hub.blocks import SPACING_S, SPAN_S, BlockInfo
from zerotop.recording.frames import Frames


def test_frames_of_blocks_and_seconds_follow_each_other() -> None:
    blocks = [BlockInfo(1, 2, 3600.0, 7199.0), BlockInfo(2, 1, 7200.0, 7799.0), BlockInfo(3, 0, 7800.5, 7859.9)]
    frames = Frames(blocks, [7860, 7861, 7900])
    assert frames.count == 60 + 60 + 60 + 3
    assert (frames.begin_s, frames.end_s) == (3600.0, 7901.0)
    assert frames.span(0) == (3600.0, 3660.0) and frames.span(60) == (7200.0, 7210.0)
    assert frames.span(120) == (7800.0, 7801.0) and frames.span(182) == (7900.0, 7901.0)
    assert [frames.at(wall) for wall in (0, 3661, 7205, 7800.2, 7880, 9999)] == [0, 1, 60, 120, 182, 182]


def test_an_empty_recording_has_no_frames() -> None:
    frames = Frames()
    assert frames.count == 0 and frames.at(5.0) <= 0
    with pytest.raises(IndexError, match="frame 0"):
        frames.span(0)


def test_a_clock_that_was_set_back_shows_no_moment_twice() -> None:
    frames = Frames([BlockInfo(1, 0, 1000.0, 1059.0), BlockInfo(2, 0, 1030.0, 1089.0)])
    spans = [frames.span(number) for number in range(frames.count)]
    assert spans == [(float(second), float(second + 1)) for second in range(1000, 1090)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(1, 60)), max_size=12), st.data())
def test_a_moment_lies_in_its_frame(pieces: list[tuple[int, int, int]], data: st.DataObject) -> None:
    at, blocks = 36_000, []
    for level, gap, samples in pieces:
        at = -(-(at + gap * 10) // SPAN_S[level]) * SPAN_S[level]
        end = at + samples * SPACING_S[level]
        blocks.append(BlockInfo(len(blocks), level, float(at), end - 0.5))
        at = end
    frames = Frames(blocks)
    ends = [frames.span(number) for number in range(frames.count)]
    assert all(one[1] <= other[0] for one, other in pairwise(ends))
    if frames.count:
        number = data.draw(st.integers(0, frames.count - 1))
        begin, end = frames.span(number)
        assert frames.at(begin) == number == frames.at(end - 0.01)
