"""The short curves in the rank table, and the colours of the figures beside them."""

from __future__ import annotations

import math

import pytest

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.state.frozen_view import freeze
from zerotop.state.histories import GPU_FIELDS, KEPT
from zerotop.tui.ascii import Plain, ascii_table
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.widgets.spark import LEVELS, relative_range, spark


def test_a_curve_has_the_newest_values_at_its_right_and_survives_anything() -> None:
    assert spark([0, 50, 100], 8, 0.0, 100.0) == "▁▅█" and spark(range(100), 3, 0.0, 99.0) == "███"
    assert spark([math.nan, 1, math.inf, -5, 500], 8, 0.0, 1.0) == "×█×▁█"
    assert spark([], 8, 0.0, 0.0) == spark([1], 0, 0.0, 1.0) == "" and spark([7], 1, 7.0, 7.0) == "▁"
    plain = LEVELS.translate(Plain(ascii_table()))
    assert plain.isascii() and len(set(plain)) >= 4 and "?" not in plain


def test_noise_is_no_mountain() -> None:
    assert set(spark([100, 101, 100, 99], 8, *relative_range([100, 101, 100, 99]))) <= {"▁", "▂"}
    assert spark([100, 300], 8, *relative_range([100, 300])) == "▁█"
    assert relative_range([]) == (0.0, 1.0) and relative_range([math.nan, 0.0]) == (0.0, 1.0)


def test_histories_are_bounded_and_those_of_another_attempt_and_of_a_gpu_that_is_gone_are_forgotten() -> None:
    run = ScriptedRun(ranks=2, gpu=True)
    for _ in range(3 * KEPT):
        run.steps(1)
        run.node()
    histories = run.state.histories
    assert len(histories.step_ms(1)) == KEPT == len(histories.of_gpu("node-a", "GPU-1", "power_w"))
    still = freeze(run.state)
    run.steps(1, step_ms=9000.0)
    assert histories.step_ms(0)[-1] > 8000 > max(still.histories.step_ms(0))
    run.status("running", attempt=2)
    assert not histories.step_ms(0) and histories.of_gpu("node-a", "1", "utilization_percent")
    run.ranks = run.per_node = 1
    run.node()
    for field in GPU_FIELDS:
        assert not histories.of_gpu("node-a", "GPU-1", field) and histories.of_gpu("node-a", "GPU-0", field)


@pytest.mark.parametrize(("gpu", "title"), [(True, "util history"), (False, "step times")])
async def test_the_table_has_a_curve_where_it_is_wide(open_app: OpenApp, gpu: bool, title: str) -> None:
    run = ScriptedRun(ranks=2, gpu=gpu)
    for percent in (5.0, 95.0, 95.0):
        run.gpu_changes[0] = {"utilization_percent": percent}
        run.node()
    run.steps(5)
    run.steps(1, step_ms=900.0)
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        text = screen_text(app)
        assert any(title in line for line in text)
        row = next(line for line in text if "▌   0" in line)
        assert ("█▁██" if gpu else "▁█ ") in row, "the newest at the right"
        for column in ("wait per step", "cost to others", "tokens/s", "phase"):
            assert any(column in line for line in text)
        await pilot.resize_terminal(120, 38)
        await settle(app, pilot)
        assert not any(title in line for line in screen_text(app))


async def test_power_and_temperature_have_curves_where_there_is_room(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2, gpu=True)
    for power, temperature in ((0.0, 30.0), (350.0, 58.0), (700.0, 87.0)):
        run.gpu_changes[0] = {"power_w": power, "temperature_c": temperature}
        run.node()
    run.steps(5)
    async with open_app(run, size=(230, 50)) as (app, pilot, _):
        text = screen_text(app)
        assert any("power trend" in line and "temp trend" in line for line in text)
        row = next(line for line in text if "▌   0" in line)
        assert row.count("▁▄█") + row.count("▁▅█") == 2, row
        await pilot.resize_terminal(160, 50)
        await settle(app, pilot)
        text = screen_text(app)
        assert not any("power trend" in line for line in text) and any("phase" in line for line in text)


async def test_below_the_ranks_stand_the_smallest_median_and_largest_value(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=12, gpu=True)
    run.gpu_changes = {3: {"temperature_c": 41.0}, 5: {"temperature_c": 84.0}}
    run.steps(5)
    run.node()
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        rows = {line.split()[1]: line for line in screen_text(app) if line[2:6].strip() in ("min", "med", "max")}
        assert "41°C" in rows["min"] and "63°C" in rows["med"] and "84°C" in rows["max"], rows
        await pilot.resize_terminal(120, 28)  # the ranks go first
        await settle(app, pilot)
        text = screen_text(app)
        assert any(" med " in line for line in text) and not any(" min " in line for line in text)


async def test_figures_worth_a_look_have_the_colour_of_a_warning(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=4, gpu=True)
    run.gpu_changes = {
        0: {"utilization_percent": 12.0},
        1: {"power_w": 699.0},
        2: {"temperature_c": 84.0},
    }
    run.steps(20)
    run.node()
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        table = app.screen.query_one(RankTable)

        def warned() -> set[str]:
            colour = app.palette.style("warning").color
            return {one.text.strip() for row in table._last for one in row.segments if one.style.color == colour}  # type: ignore[union-attr]

        assert {"12%", "699/700 W", "84°C"} <= warned() and "95%" not in warned()
        run.status("paused")
        await settle(app, pilot)
        assert "12%" not in warned(), "a GPU of a paused run has nothing to do"
