"""The drawing parts by themselves: bars, plots, timelines, figures as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.style import Style

from zerotop.clean import clean
from zerotop.format import (
    as_float,
    bytes_text,
    clock_text,
    count_text,
    digits_text,
    duration_text,
    figure_text,
    finish_text,
    flops_text,
    ms_text,
    ms_tick_text,
    percent_tick_text,
    rate_text,
    share_text,
    short_bytes_text,
    tick_text,
    time_text,
    used_of,
)
from zerotop.tui.text import dots
from zerotop.tui.theme import load_palettes
from zerotop.tui.widgets.bar import meter, split_cells, stacked_bar, thin_bar
from zerotop.tui.widgets.lines import Row, fit
from zerotop.tui.widgets.timeline import Cell, lane_cells, paint, timeline_rows

PLAIN = Style()
VALUES = st.lists(st.floats(0, 1e12, allow_nan=False), max_size=9)


@given(VALUES, st.floats(0, 1e12, allow_nan=False), st.integers(0, 200))
def test_cells_fill_a_bar_and_never_burst_it(values: list[float], total: float, width: int) -> None:
    cells = split_cells(values, total, width)
    assert len(cells) == len(values) and all(cell >= 0 for cell in cells) and sum(cells) <= width
    if total > 0:
        scale = max(total, sum(values))
        assert all(not cell for value, cell in zip(values, cells, strict=True) if not value)
        for value, cell in zip(values, cells, strict=True):
            # Off by its rounding, and by what it had to give to the small ones.
            assert abs(cell - value / scale * width) < 1 + len(values)


def test_a_small_part_keeps_its_cell() -> None:
    assert split_cells([1e9, 1.0, 1e9], 4e9, 20) == [4, 1, 5]
    assert split_cells([1.0, 0.0, 1e9], 1e9, 10) == [1, 0, 9]


def test_a_trace_never_looks_like_a_third() -> None:
    """Eight ranks' memory in the 12 to 20 cells that a table at 120 columns has: 33% against traces."""
    for width in (12, 20):
        cells = split_cells([46.0, 46.0, 46.0, 0.2, 0.1, 0.1, 0.01], 140.0, width)
        assert min(cells[:3]) >= 3 and max(cells[3:]) <= 1 and sum(cells[:3]) >= sum(cells) * 0.7
    assert sum(split_cells([1.0] * 9, 140.0, 12)) == 1  # the filled part is to scale, too


def test_a_full_bar_is_full_and_labels_fit() -> None:
    segments = stacked_bar([("parameters", 50, PLAIN), ("cache", 45, PLAIN), ("other", 5, PLAIN)], 100, 40, PLAIN)
    text = "".join(segment.text for segment in segments)
    assert cell_len(text) == 40 and "parameters" in text and " cache " in text and text.rstrip().endswith("o")


@given(st.floats(-1, 2, allow_nan=False), st.integers(1, 80))
def test_meters_keep_their_width(share: float, width: int) -> None:
    for bar in (meter, thin_bar):
        assert cell_len("".join(s.text for s in bar(share, width, PLAIN, PLAIN))) == width


def cells_of(*runs: tuple[str, int, bool, int]) -> list[Cell]:
    return [(phase, micro, waited) for phase, micro, waited, count in runs for _ in range(count)]


def test_a_timeline_shows_each_phase_where_most_of_its_cell_is() -> None:
    spans = [("forward", 7, 1, 1000, 4000), ("backward", 7, 1, 4000, 10000)]
    assert lane_cells(spans, [], 1000, 9000, 9) == cells_of(("forward", 1, False, 3), ("backward", 1, False, 6))
    expected = cells_of(("forward", 1, False, 1), ("backward", 1, False, 2), ("", 0, False, 3))
    assert lane_cells(spans, [], 1000, 18000, 6) == expected


def test_waiting_is_hatched_where_the_thread_was_blocked() -> None:
    spans = [("reduce", 7, 0, 0, 10_000)]
    records = [(1, "reduce", 4, 0, 10_000, 10, 4)]  # blocked for the last 4 of 10 us
    cells = lane_cells(spans, records, 0, 10_000, 10)
    assert cells == cells_of(("reduce", 0, False, 6), ("reduce", 0, True, 4))
    assert "".join(segment.text for segment in paint(cells, load_palettes()[0]["dark"])).endswith("╱╱╱╱")


def test_blocks_name_their_phase_and_micro_step_as_far_as_they_fit() -> None:
    palette = load_palettes()[0]["dark"]
    for size, expected in ((11, "forward 3"), (10, "forward"), (4, "F3"), (1, "F")):
        cells = cells_of(("forward", 3, False, size))
        assert "".join(segment.text for segment in paint(cells, palette)).strip() == expected


def test_a_timeline_draws_the_newest_steps_on_one_scale() -> None:
    palette = load_palettes()[0]["dark"]
    spans = [("forward", step, 1, step * 100_000_000, step * 100_000_000 + step * 10_000_000) for step in range(1, 9)]
    rows = timeline_rows(spans, [], palette, 60, 4)
    lines = ["".join(s.text for s in row.segments) for row in rows]
    assert [line.split()[0] for line in lines] == ["5", "6", "7", "8"] and lines[-1].endswith("80.0 ms")
    assert all(row.width == 60 for row in rows)
    assert len(timeline_rows([], [], palette, 60, 4)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1.00 KiB"),
        (bytes_text(1536 * 2**20), "1.50 GiB"),
        (bytes_text(3 * 2**40), "3.00 TiB"),
        (bytes_text(None), "n/a"),
        (short_bytes_text(40 * 2**30), "40.0G"),
        (short_bytes_text(0), "0"),
        (used_of(38 * 2**30, 140 * 2**30), "38.0/140 GiB"),
        (used_of(3 * 2**30, 24 * 2**30), "3.00/24.0 GiB"),
        (used_of(442 * 2**20, 24 * 2**30), "442 MiB/24.0 GiB"),
        (count_text(999), "999"),
        (count_text(12_340), "12.3K"),
        (count_text(1_310_000_000), "1.31B"),
        (count_text(999_999), "1.00M"),
        (count_text(None), "n/a"),
        (rate_text(12_340), "12.3K tokens/s"),
        (rate_text(None), "n/a tokens/s"),
        (flops_text(43.1e9), "43.1 GFLOPs"),
        (flops_text(999.7e9), "1 TFLOPs"),
        (flops_text(950), "950 FLOPs"),
        (flops_text(None), "n/a"),
        (duration_text(0.5), "0.5 s"),
        (duration_text(59.4), "59 s"),
        (duration_text(59.6), "1m 00s"),
        (duration_text(60), "1m 00s"),
        (duration_text(3725), "1h 02m"),
        (duration_text(90_000), "1d 1h"),
        (duration_text(math.inf), "n/a"),
        (ms_text(0.04), "0.0 ms"),
        (ms_text(99.96), "100 ms"),
        (ms_text(999.4), "999 ms"),
        (ms_text(1250), "1.25 s"),
        (ms_text(12_000), "12.0 s"),
        (ms_text(185_000), "3m 05s"),
        (digits_text(0.0312), "0.0312"),
        (digits_text(12.345), "12.3"),
        (digits_text(1234.5), "1,234"),
        (digits_text(121.7, 2), "122"),
        (figure_text(2.34567), "2.3457"),
        (figure_text(12.34567), "12.35"),
        (figure_text(None), "n/a"),
        (figure_text(0.0003), "3.00e-4"),
        (figure_text(math.nan), "NaN"),
        (figure_text(-math.inf), "-inf"),
        (dots(0, 4), "○○○○"),
        (dots(3, 4), "●●◐○"),
        (dots(4, 4), "●●●◐"),
        (dots(1, 1), ""),
        (dots(64, 64), "●●●●●●●◐"),
        (dots(1, 64, 4), "◐○○○"),
        (tick_text(0, 0.5), "0"),
        (tick_text(2.5, 0.5), "2.5"),
        (tick_text(2.0, 0.25), "2.00"),
        (tick_text(12_500, 2500), "12,500"),
        (tick_text(165_000, 5000), "165K"),
        (tick_text(0.0003, 0.0001), "3e-4"),
        (tick_text(2.5e6, 5e5), "2.5M"),
        (tick_text(math.nan, 1), "n/a"),
        (ms_tick_text(250, 50), "250 ms"),
        (ms_tick_text(1500, 500), "1.5 s"),
        (percent_tick_text(0.4, 0.05), "40%"),
        (finish_text(1_790_000_000 + 60, 1_790_000_000)[2], ":"),
        (finish_text(1_790_000_000 + 3 * 86_400, 1_790_000_000)[:3] in {"Thu", "Wed"} and "day", "day"),
        (finish_text(math.inf, 0.0), "n/a"),
        (fit("abcdef", 4), "abc…"),
        (fit("ab", 4, right=True), "  ab"),
        (fit("漢字漢字", 5), "漢字…"),
    ],
)
def test_figures_as_text(text: str, expected: str) -> None:
    assert text == expected


ANY_NUMBER = st.one_of(st.integers(-(10**400), 10**400), st.floats(), st.integers(-(2**63), 2**63))


@given(ANY_NUMBER, ANY_NUMBER)
def test_every_number_can_be_written(number: float, other: float) -> None:
    for write in (bytes_text, count_text, duration_text, ms_text, figure_text):
        assert 0 < len(write(number)) <= 12, write
    assert len(share_text(number, other)) <= 8 and len(clock_text(number)) <= 8 and len(used_of(number, other)) <= 24  # type: ignore[arg-type]
    assert time_text(number) == "" or len(time_text(number)) >= 24
    assert len(dots(int(as_float(number) or 0), int(as_float(other) or 0))) <= 8
    assert sum(split_cells([number, other], number, 20)) <= 20
    for bar in (meter, thin_bar):
        assert cell_len("".join(s.text for s in bar(number, 9, PLAIN, PLAIN))) == 9


def test_a_row_counts_cells_not_characters() -> None:
    row = Row().add("漢字").gap().cell("x", 3, right=True).to(10)
    assert row.width == 10 and row.strip(6).text == "漢字  "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\nlines", "plain\nlines"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;a title\x07text", "text"),
        ("10%\r50%\r100%\n", "100%\n"),
        ("a\tb", "a   b"),
        ("bell\x07 and \x9b2J", "bell and 2J"),
        ("\x1b", ""),
    ],
)
def test_what_a_rank_says_cannot_steer_the_terminal(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert all(ch.isprintable() for ch in Row().add(text).strip(80).text)
