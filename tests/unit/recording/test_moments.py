"""Moments as people write them."""

from __future__ import annotations

import time

import pytest

from zerotop.recording.moments import Extent, MomentError, parse_moment

BEGIN_S = time.mktime((2026, 11, 30, 23, 0, 0, 0, 0, -1))
EXTENT = Extent(BEGIN_S, BEGIN_S + 3 * 3600, lambda step: BEGIN_S + step if step <= 100 else None)


@pytest.mark.parametrize(
    ("text", "after_s"),
    [
        ("start", 0), ("end", 10_800), ("50%", 5400), ("12", 12), ("step 12", 12), ("s12", 12), ("90s", 90),
        ("+5m", 300),
        ("2h30m", 9000), ("2h 30m", 9000), ("1.5h", 5400), ("-10m", 10_200), ("23:30", 1800), ("23:30:05", 1805),
        ("00:30", 5400), ("2026-12-01T00:30", 5400), ("2026-12-01 00:30:10", 5410), (" END ", 10_800),
    ],
)  # fmt: skip
def test_a_moment_is_understood(text: str, after_s: float) -> None:
    assert parse_moment(text, EXTENT) == BEGIN_S + after_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a moment: expected a step"),
        ("soon", "'soon' is not a moment: expected a step (1200), a time from the beginning"),
        ("101", "the recording has no step 101"),
        ("4h", "4h is outside the recording, which is from 2026-11-30 23:00:00 to 2026-12-01 02:00:00"),
        ("-4h", "outside the recording"),
        ("120%", "outside the recording"),
        ("12:00", "outside the recording"),
        ("25:00", "25:00 is not a time of day"),
        ("2026-11-01T10:00", "outside the recording"),
    ],
)
def test_anything_else_says_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(MomentError) as caught:
        parse_moment(text, EXTENT)
    assert message in str(caught.value)
