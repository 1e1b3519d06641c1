"""Plots by themselves: ranges, round numbers, bands, gaps, marks and the cursor."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.style import Style

from tests.harness.fakehub import step_result
from tests.tui.screen_reading import OpenApp, head_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.state.losstrend import EarlierRun, loss_trend
from zerotop.state.series import Series
from zerotop.state.smoothing import FEWEST, envelope, smooth
from zerotop.tui.lens import LEAST_STEPS, Lens
from zerotop.tui.widgets.lines import Row
from zerotop.tui.widgets.plot import BEST_MARK, CLIPPED, MARK, AxisMark, Curve, Look, draw_plot
from zerotop.tui.widgets.scale import Axis, log_ticks, robust_range, round_step, round_ticks, value_axis

PLAIN, BAND, LINE = Style(), Style(color="red"), Style(color="blue")
VALUES = st.lists(st.one_of(st.none(), st.floats()), max_size=60)


def look(**more: object) -> Look:
    return Look(PLAIN, PLAIN, PLAIN, **more)  # type: ignore[arg-type]


def texts(rows: list[Row]) -> list[str]:
    return ["".join(segment.text for segment in row.segments) for row in rows]


def points_of(values: list[float | None]) -> list[tuple[float, float | None]]:
    return [(float(at), value) for at, value in enumerate(values)]


def band_of(values: list[float | None]) -> list[tuple[float, float | None, float | None]]:
    edges = envelope(values, smooth(values))
    return [(float(at), low, high) for at, (low, high) in enumerate(edges)]


# ---- drawing ---------------------------------------------------------------------------------------------------------
@given(VALUES, st.integers(1, 100), st.integers(0, 20), st.booleans())
@example([2.2e-309], 12, 2, False)
@example([2.225073858507e-311], 12, 2, True)
@example([-1.7e308, 1.7e308], 40, 9, False)
@example([0.0, -1.0, 1e-300, 1e299], 40, 9, True)
def test_a_plot_of_anything_stays_in_its_box(values: list[float | None], width: int, height: int, log: bool) -> None:
    curve = Curve(points_of(values), LINE, band_of(values), BAND)
    drawn = draw_plot([curve], width, height, look(log=log, cursor=3.0, marks=[AxisMark(2, "C", PLAIN)]))
    assert len(drawn.rows) == height
    if width >= 40:
        assert all(row.width <= width for row in drawn.rows)


def test_a_line_rises_where_its_values_rise_and_has_a_gap_where_they_are_nan() -> None:
    values = [None if 40 <= x < 60 else float(x) for x in range(100)]
    drawn = draw_plot([Curve(points_of(values), LINE)], 63, 10, look())
    lines = texts(drawn.rows)
    assert drawn.left == 3 and lines[-1].rstrip().endswith("step 99")
    columns = [next((y for y in range(8) if lines[y][3 + x] not in " ╌"), None) for x in range(60)]
    shown = [y for y in columns if y is not None]
    assert shown == sorted(shown, reverse=True) and columns[0] == 7 and columns[-1] == 0
    assert all(y is None for y in columns[25:36]) and columns.count(None) >= 10


def test_a_steep_line_has_no_holes() -> None:
    drawn = draw_plot([Curve([(0.0, 0.0), (1.0, 0.0), (2.0, 100.0), (3.0, 100.0)], LINE)], 44, 10, look())
    body = [line[drawn.left :] for line in texts(drawn.rows)[:8]]
    assert all(line.replace("╌", "").strip() for line in body)


def test_the_line_lies_over_the_band_and_both_have_their_own_style() -> None:
    rng = random.Random(1)
    raw: list[float | None] = [math.sin(x / 20) + rng.uniform(-0.4, 0.4) for x in range(200)]
    drawn = draw_plot([Curve(points_of(smooth(raw)), LINE, band_of(raw), BAND)], 60, 12, look())
    styles = [[segment.style for segment in row.segments] for row in drawn.rows[:10]]
    cells = {style: sum(len(s.text) for row in drawn.rows[:10] for s in row.segments if s.style == style)
             for style in (LINE, BAND)}  # fmt: skip
    assert any(LINE in row for row in styles) and cells[BAND] > cells[LINE] > 50


def test_a_spike_of_the_first_steps_does_not_flatten_the_rest_and_is_marked() -> None:
    values: list[float | None] = [60.0, 20.0] + [3.0 - x / 400 for x in range(300)]
    drawn = draw_plot([Curve(points_of(values), LINE)], 60, 12, look())
    lines = texts(drawn.rows)
    assert lines[0][drawn.left] == CLIPPED and "60" not in "".join(lines)
    rows = {y for y in range(10) for x in range(10, 50) if lines[y][drawn.left + x] not in " ╌"}
    assert len(rows) >= 7, "the falling line takes the height of the plot"


def test_round_numbers_stand_at_the_axes_and_marks_on_the_axis() -> None:
    marks = [AxisMark(40, "C", PLAIN), AxisMark(70, "↻", PLAIN)]
    drawn = draw_plot([Curve(points_of([2.0 + x / 100 for x in range(101)]), LINE)], 66, 12, look(marks=marks))
    lines = texts(drawn.rows)
    assert [line.split("┤")[0].strip() for line in lines if "┤" in line] == ["3.0", "2.8", "2.6", "2.4", "2.2", "2.0"]
    axis = lines[-2]
    assert axis[drawn.left + 2 * 40 * 62 // 200] == "C" and "↻" in axis and "┬" in axis
    assert lines[-1].split()[:3] == ["0", "25", "50"]


def test_the_cursor_is_a_line_and_a_sign_at_its_step() -> None:
    drawn = draw_plot([Curve(points_of([1.0] * 101), LINE)], 66, 12, look(cursor=50.0))
    lines = texts(drawn.rows)
    assert drawn.x is not None
    place = drawn.left + drawn.x.at(50.0) // 2
    assert lines[-2][place] == "▲" and sum(line[place] == "│" for line in lines[:10]) >= 8


def test_marked_points_stand_over_the_lines_and_the_best_over_its_neighbours() -> None:
    marked = Curve([(20.0, 2.0), (60.0, 1.0), (61.0, 1.1)], BAND, marked=True, best=60.0)
    text = "".join(texts(draw_plot([Curve(points_of([2.0] * 101), LINE), marked], 66, 12, look()).rows))
    assert text.count(MARK) >= 1 and text.count(BEST_MARK) == 1


def test_a_log_axis_gives_each_decade_the_same_height() -> None:
    values = [10.0 ** (x / 25) for x in range(101)]  # 1 .. 10,000
    drawn = draw_plot([Curve(points_of(values), LINE)], 66, 12, look(log=True))  # type: ignore[arg-type]
    labels = {line.split("┤")[0].strip(): y for y, line in enumerate(texts(drawn.rows)) if "┤" in line}
    assert {"1", "10", "100", "1,000", "10,000"} <= set(labels)
    assert abs((labels["1"] - labels["100"]) - (labels["100"] - labels["10,000"])) <= 1


# ---- axes ------------------------------------------------------------------------------------------------------------
@given(st.floats(1e-9, 1e12), st.integers(1, 12))
def test_steps_are_round_and_not_too_many(span: float, most: int) -> None:
    step = round_step(span, most)
    factor = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(factor, one, rel_tol=1e-6) for one in (1, 2, 2.5, 5, 10)) and span / step <= most * 1.001
    assert len(round_ticks(0.0, span, most)) <= most + 1


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200))
def test_the_range_holds_nearly_all_values(values: list[float]) -> None:
    low, high = robust_range(values)
    assert low < high
    inside = sum(low <= value <= high for value in values)
    assert inside >= 0.9 * len(values) - 2


def test_ordinary_curves_are_shown_whole() -> None:
    decay = [2.2 + 3.4 * math.exp(-x / 45) for x in range(200)]
    assert robust_range(decay) == (min(decay), max(decay))
    assert robust_range([5.0] * 20) == (4.75, 5.25) and robust_range([0.0]) == (-1.0, 1.0)


def test_an_axis_and_its_inverse_agree() -> None:
    for axis in (Axis(3, 9, 100), Axis(0.1, 1e4, 100, True)):
        for position in (0, 17, 99):
            assert axis.at(axis.value(position)) == position
    assert log_ticks(0.5, 200, 6) == [1, 10, 100] or len(log_ticks(0.5, 200, 6)) <= 7
    assert not value_axis([-1.0, -2.0], 10, True).log


# ---- smoothing and trend ---------------------------------------------------------------------------------------------
def test_smoothing_removes_noise_and_moves_no_bend() -> None:
    rng = random.Random(3)
    truth = [abs(x - 100) / 50 for x in range(201)]
    noisy: list[float | None] = [value + rng.uniform(-0.3, 0.3) for value in truth]
    found = smooth(noisy)
    error = [abs((a or 0) - b) for a, b in zip(found, truth, strict=True)]
    assert sum(error) / len(error) < 0.1
    assert min(range(201), key=lambda at: found[at] or 0) in range(92, 109)
    assert smooth([1.0] * (FEWEST - 1) + [9.0])[-1] != 9.0 and smooth([1.0, 9.0]) == [1.0, 9.0]


def test_the_envelope_holds_the_values_and_is_as_wide_as_the_noise() -> None:
    rng = random.Random(4)
    steep: list[float | None] = [100.0 - x + rng.uniform(-0.5, 0.5) for x in range(100)]
    line = smooth(steep)
    edges = envelope(steep, line)
    for value, (low, high) in zip(steep[5:-5], edges[5:-5], strict=True):
        assert low is not None and high is not None and value is not None
        assert low <= value <= high and high - low < 2.5
    assert envelope([1.0, None, math.nan], [1.0, None, None]) == [(1.0, 1.0), (None, None), (None, None)]


def test_smoothing_leaves_gaps_open() -> None:
    values: list[float | None] = [1.0] * 50
    values[20], values[30] = None, math.nan
    found = smooth(values)
    assert found[20] is None and found[30] is None and found[21] == pytest.approx(1.0)


def series_of(losses: list[float]) -> Series:
    series = Series()
    for step, loss in enumerate(losses, 1):
        series.add(step_result(0, step, loss=loss))
    return series


def test_the_trend_is_that_of_the_last_tenth_and_knows_noise() -> None:
    rng = random.Random(5)
    falling = series_of([5 - x / 250 + rng.uniform(-0.05, 0.05) for x in range(500)])
    flat = series_of([5 - x / 100 if x < 300 else 2.0 + rng.uniform(-0.1, 0.1) for x in range(500)])
    rising = series_of([3.0 if x < 400 else 3 + (x - 400) / 100 for x in range(500)])
    assert loss_trend(falling).direction == "falling" and loss_trend(falling).per_1000 == pytest.approx(-4, rel=0.3)
    assert loss_trend(flat).direction == "flat" and loss_trend(rising).direction == "rising"
    assert loss_trend(series_of([3.0] * 3)).direction == "too early" and loss_trend(Series()).newest is None


def test_a_loss_that_is_not_a_number_is_said_and_counted() -> None:
    trend = loss_trend(series_of([3.0] * 30 + [math.nan] * 2))
    assert trend.direction == "not a number" and trend.not_finite == 2 and trend.best == 3.0 and trend.best_step == 1


def test_spikes_of_the_gradient_norm_are_counted_once_there_is_a_usual_norm() -> None:
    series = Series()
    norms = [50.0, 1.0, 9.0, *[1.0 + step % 5 / 10 for step in range(40)], 7.0, 1.1, math.inf, 1.2]
    for step, norm in enumerate(norms, 1):
        series.add(step_result(0, step, grad_norm=norm))
    assert series.spikes == 2, "the first steps are restless"
    assert series.norms[-3:] == [7.0, 1.1, 1.2] and series.copy().spikes == 2
    series.add(step_result(0, 47, grad_norm=math.inf, skipped=True, skipped_steps=3))
    trend = loss_trend(series)
    assert (trend.spikes, trend.skipped, trend.norm) == (2, 3, math.inf)
    series.add(step_result(0, 45, grad_norm=1.0))  # a restart takes the steps again
    assert series.spikes == 1 and series.norms[-2:] == [7.0, 1.0]


async def test_the_loss_line_has_skipped_steps_and_spikes_and_where_there_is_room_the_norm(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(30)
    async with open_app(run, size=(200, 40)) as (app, pilot, _):
        assert "norm 1." in head_text(app) and "spike" not in head_text(app) and "skipped" not in head_text(app)
        last = run.state.series.newest
        assert last is not None
        run.say(last.model_copy(update={"step": 31, "grad_norm": 99.0, "skipped_steps": 2}))
        await settle(app, pilot)
        assert "2 skipped, 1 norm spike" in head_text(app) and "norm 99 " in head_text(app)
        assert "▁█ │" in head_text(app), "the newest norm is at the right"
        await pilot.resize_terminal(120, 38)
        await settle(app, pilot)
        assert "2 skipped, 1 norm spike" in head_text(app) and "norm 99" not in head_text(app)


def test_the_loss_is_compared_with_an_earlier_run_at_the_same_step() -> None:
    earlier = EarlierRun("before", tuple((float(step), 3.0) for step in range(1, 201)))
    trend = loss_trend(series_of([2.5] * 100), earlier)
    assert trend.against == pytest.approx(-0.5) and trend.against_name == "before"
    assert loss_trend(series_of([2.5] * 300), earlier).against is None, "the earlier run did not get so far"


# ---- the lens --------------------------------------------------------------------------------------------------------
def test_zooming_follows_the_newest_step_and_keeps_the_cursor_in_place() -> None:
    lens = Lens().zoomed(2, (1, 1001))
    assert lens.window((1, 1001)) == (501, 1001) and lens.window((1, 1101)) == (601, 1101)
    assert lens.zoomed(0.25, (1, 1001)).whole
    at = Lens(cursor=200).zoomed(4, (1, 1001))
    left, right = at.window((1, 1001))
    assert left < 200 < right and right - left == 250 and at.window((1, 2001)) == (left, right)
    assert Lens().zoomed(1e9, (1, 1001)).window((1, 1001)) == (1001 - LEAST_STEPS, 1001)


def test_panning_stays_on_the_run_and_the_cursor_stays_in_sight() -> None:
    lens = Lens().zoomed(4, (0, 1000)).panned(-1, (0, 1000))
    assert lens.window((0, 1000)) == (500, 750)
    assert lens.panned(-99, (0, 1000)).window((0, 1000)) == (0, 250) and Lens().panned(-1, (0, 1000)) == Lens()
    steps = list(range(0, 1001, 10))
    moved = lens.moved(1, steps)
    assert moved.cursor == 750 and moved.moved(1, steps).cursor == 760
    far = moved.moved(-60, steps)
    left, right = far.window((0, 1000))
    assert far.cursor == 150 and left <= 150 <= right
