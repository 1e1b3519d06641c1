"""The screens behind the number keys: what they show, and every key on them."""

from __future__ import annotations

import pytest
from textual.containers import VerticalScroll
from textual.widgets import Input

from runtime.wire.messages import PlannedMemory
from tests.tui.screen_reading import OpenApp, head_text, screen_text, settle
from tests.tui.scripted_run import GIB, ScriptedRun
from zerotop.state.losstrend import EarlierRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES
from zerotop.tui.lens import Lens
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.lanes import LanePanel
from zerotop.tui.panels.log import LogPanel
from zerotop.tui.panels.memory_bars import PEAK, PLAN
from zerotop.tui.panels.peaks import PeakPanel
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.panels.skew import SkewMap
from zerotop.tui.screens.knobs import KnobScreen
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.rank import RankScreen


def text_of(app: ZerotopApp) -> str:
    return "\n".join(screen_text(app))


def planned(run: ScriptedRun) -> None:
    """Give every rank peaks and a plan."""
    plan = PlannedMemory(
        device_bytes={"parameters": 13 * GIB, "optimizer": 6 * GIB, "activations": 20 * GIB, "context": GIB},
        shape_known=True, saved_bytes=GIB, comparison="ZeRO saves 1.00 GiB per rank", checkpoint_bytes=2 * GIB,
    )  # fmt: skip
    for rank in run.state.ranks.values():
        assert rank.hello is not None and rank.memory is not None
        run.say(
            rank.hello.model_copy(update={"planned": plan, "knobs": {"checkpoint_interval": 50, "log_interval": 5}})
        )
        peaks = {
            "peak_bytes": {"backward": 44 * GIB, "forward": 30 * GIB},
            "activation_bytes": {"backward": 18 * GIB},
            "unit_activations": {"blocks.*": (24, 12 * GIB), "head": (1, 3 * GIB)},
        }
        run.say(rank.memory.model_copy(update=peaks))


async def test_every_number_key_opens_its_screen_and_escape_leads_back(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=8, gpu=True, finetune=True)
    run.steps(60)
    async with open_app(run, size=(120, 44)) as (app, pilot, _):
        for key, name in PAGE_NAMES.items():
            await pilot.press(key)
            await settle(app, pilot)
            assert app.page is not None and name == app.page.NAME and isinstance(app.screen, PageScreen)
            assert app.focused is not None, f"{name} has no focus"
            line = next(line for line in screen_text(app) if "1 Overview" in line)
            assert f"{key} {name}" in line
            if key != "1":
                await pilot.press("escape")
                await settle(app, pilot)
                assert isinstance(app.page, OverviewPage)
        assert run.sent == []


async def test_the_header_answers_five_questions_at_every_size(open_app: OpenApp) -> None:
    for size in ((80, 24), (120, 38), (200, 50), (300, 80)):
        run = ScriptedRun(ranks=8, gpu=True, finetune=True)
        run.slow_rank = -1
        run.steps(130)
        planned(run)
        async with open_app(run, size=size) as (app, pilot, _):
            app.clock = lambda: 1_790_000_000.0
            app.update_view()
            await pilot.pause()
            head = "\n".join(screen_text(app)[: app.screen.query_one("#header").region.bottom])
            assert "✔ healthy" in head, size
            assert "step 130 of 200" in head and "done " in head and " in 28 s" in head, size
            assert "loss 2." in head and "▼ falling" in head, size
            assert "fullest GPU" in head and "/140 GiB 2" in head and "%" in head, size
            assert "next: checkpoint in 20 steps" in head and "evaluation in 20 steps" in head, size
            if size[0] >= 120:
                assert ("best 2." in head and "evaluation 2." in head) or size[0] == 120, size


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_the_header_names_the_machine(size: tuple[int, int]) -> None:
    run = ScriptedRun()
    run.steps(8)
    app = ZerotopApp(run, host="alice@gpu-box")
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        head = head_text(app)
        assert f"{'alice@gpu-box'[: max(8, size[0] // 6) - 1]}" in head and "● live" in head
        host = run.state.ranks[0].hello.host  # type: ignore[union-attr]
        assert (f"on {host}" in head) == (size[0] == 200)


async def test_the_header_compares_the_loss_with_an_earlier_run(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(60)
    earlier = EarlierRun("before", tuple((float(step), 9.0) for step in range(1, 100)))
    app = ZerotopApp(run, find_earlier=lambda hello: (earlier,) if hello.model_name == "gpt-tiny" else ())
    async with app.run_test(size=(200, 50)) as pilot:
        await settle(app, pilot)
        await app.workers.wait_for_complete()
        await settle(app, pilot)
        assert "below before at this step" in text_of(app)
        await pilot.press("5", "o")
        await settle(app, pilot)
        assert not app.lens.overlay


async def test_memory_shows_limits_peaks_plan_and_what_comes(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=4, gpu=True)
    run.steps(20)
    planned(run)
    async with open_app(run, size=(160, 44)) as (app, pilot, _):
        await pilot.press("2")
        await settle(app, pilot)
        text = text_of(app)
        assert text.count(PEAK) >= 5 and text.count(PLAN) >= 5  # a rank each, and the title
        assert "node-a" in text and "9.00 GiB/1.00 TiB" in text and "140 GiB" in text
        assert "peak 44.0 GiB in backward" in text and "planned" in text and "ZeRO saves 1.00 GiB per rank" in text
        bar = next(line for line in screen_text(app) if "cuda:0" in line)
        assert bar.count("·") > 45, "39 of 140 GiB leave most of the bar free"
        await pilot.press("down", "j")
        await settle(app, pilot)
        assert app.screen.query_one(PeakPanel).rank == 2 and "peaks of rank 2" in text_of(app)
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.rank == 2
        await pilot.press("escape")
        await settle(app, pilot)
        assert app.page is not None and app.page.NAME == "Memory"


async def test_the_timeline_zooms_pans_reads_and_follows(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2, gpu=True)
    run.steps(12)
    async with open_app(run, size=(160, 40)) as (app, pilot, _):
        await pilot.press("3")
        await settle(app, pilot)
        lanes = app.screen.query_one(LanePanel)
        whole = lanes.span_ns
        assert "▾ step 12" in text_of(app) and "newest" in text_of(app) and "F1" in text_of(app)
        await pilot.press("plus")
        assert lanes.span_ns == whole // 2
        await pilot.press("minus")
        assert abs(lanes.span_ns - whole) <= 1
        await pilot.press("shift+left")
        assert lanes.end_ns is not None and "scrolled back" in str(lanes.border_title)
        await pilot.press("left", "left", "down")
        await settle(app, pilot)
        assert (
            lanes.cursor_ns is not None
            and "│ rank 1: " in str(lanes.border_title)
            and "of step" in str(lanes.border_title)
        )
        before = [line for line in screen_text(app) if "F1" in line]
        run.steps(2)
        await settle(app, pilot)
        assert [line for line in screen_text(app) if "F1" in line] == before, "what is read stands still"
        await pilot.press("0")
        await settle(app, pilot)
        assert lanes.end_ns is None and lanes.cursor_ns is None and "▾ step 14" in text_of(app)
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.rank == 1


async def test_communication_names_the_late_rank_and_the_costs(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=4, gpu=True)
    run.steps(40)
    async with open_app(run, size=(160, 44)) as (app, pilot, _):
        await pilot.press("4")
        await settle(app, pilot)
        text = text_of(app)
        assert "reduce" in text and "6.00 MiB" in text and "GiB/s" in text and "exposed per step" in text
        rows = {
            line.split()[1]: line
            for line in text_of(app).replace("▌", " ").splitlines()
            if (line.startswith("│    ") and "·" in line) or "▓" in line
        }
        assert "▓" in rows["3"] and "▓" not in rows["0"]
        await pilot.press("left", "left")
        await settle(app, pilot)
        assert app.lens.cursor == 38 and "step 38: rank 3 most" in text_of(app)
        await pilot.press("g")
        await settle(app, pilot)
        assert app.screen.query_one(SkewMap).chosen == 1 and "what a rank waited for others" in text_of(app)
        await pilot.press("5")
        await settle(app, pilot)
        assert "step 38: 2." in text_of(app) or "step 38: 3." in text_of(app), "the cursor is shared"


async def test_the_timeline_and_the_heat_map_share_the_cursor_and_the_range_with_the_plots(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=4)
    run.steps(12)
    async with open_app(run, size=(140, 40)) as (app, pilot, _):
        await pilot.press("3")
        await settle(app, pilot)
        lanes = app.screen.query_one(LanePanel)
        await pilot.press("left")
        await settle(app, pilot)
        assert app.lens.cursor == 12 and "of step 12" in str(lanes.border_title)
        for _ in range(50):
            await pilot.press("left")
        await settle(app, pilot)
        assert app.lens.cursor == 11 and "of step 11" in str(lanes.border_title), "it followed the cursor"
        await pilot.press("5", "left", "left", "left", "left", "left")
        await settle(app, pilot)
        assert app.lens.cursor == 6
        await pilot.press("3")
        await settle(app, pilot)
        assert "of step 6" in str(lanes.border_title), "and it goes where the cursor of the plots has gone"
        assert lanes.cursor_ns is not None and any("▾ step 6" in line for line in screen_text(app))
        await pilot.press("0")
        await settle(app, pilot)
        assert app.lens.cursor is None and lanes.cursor_ns is None and lanes.end_ns is None

        run.steps(40)
        await pilot.press("4")
        await settle(app, pilot)
        skew = app.screen.query_one(SkewMap)
        whole = len(skew._steps)
        skew.focus()
        await pilot.press("plus", "plus")
        await settle(app, pilot)
        shown = skew._steps
        assert len(shown) < whole / 3 and shown[-1] >= 51 and app.lens.window((1, 52))[0] <= shown[0]
        await pilot.press("shift+left")
        await settle(app, pilot)
        assert skew._steps[-1] < 50
        await pilot.press("j", "j", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.rank == 2
        await pilot.press("escape", "0")
        await settle(app, pilot)
        assert app.lens.whole and len(skew._steps) == whole
        app.set_lens(Lens(first=1.0, last=3.0))
        run.steps(400)
        await settle(app, pilot)
        assert "none of the steps 1 to 3 is here: the map has" in text_of(app)


async def test_training_zooms_reads_and_switches_scales(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2, finetune=True)
    run.steps(180)
    async with open_app(run, size=(160, 48)) as (app, pilot, _):
        await pilot.press("5")
        await settle(app, pilot)
        text = text_of(app)
        for title in ("loss", "evaluation perplexity", "gradient norm", "learning rate", "tokens/s", "step time"):
            assert title in text, title
        await pilot.press("plus", "plus")
        await settle(app, pilot)
        assert app.lens.window((1, 180)) == (180 - 179 / 4, 180) and text_of(app).count("step 180") >= 5
        await pilot.press("shift+left", "left", "left")
        await settle(app, pilot)
        cursor = app.lens.cursor
        assert cursor is not None and text_of(app).count(f"step {cursor}: ") >= 4 and "smoothed" in text_of(app)
        await pilot.press("l", "a")
        await settle(app, pilot)
        assert app.lens.log and not app.lens.smooth and "smoothed" not in text_of(app)
        await pilot.press("0")
        assert app.lens.whole and app.lens.cursor is None
        await pilot.press("z")
        await settle(app, pilot)
        assert app.screen.query_one("#plot-loss").region.height > 35


async def test_progress_lines_are_hidden_until_they_are_asked_for(open_app: OpenApp) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        run.log("step 21/100 · loss 2.5", logger="runtime.train")
        run.log("step 22/100 was slow", "warning", logger="runtime.train")
        run.log("step on it")
        await settle(app, pilot)
        assert "step on it" in text_of(app) and "was slow" in text_of(app) and "21/100" not in text_of(app)
        await pilot.press("6")
        await settle(app, pilot)
        assert "progress lines hidden" in text_of(app) and "21/100" not in text_of(app)
        await pilot.press("v")
        await settle(app, pilot)
        assert "progress lines hidden" not in text_of(app) and "21/100 · loss 2.5" in text_of(app)
        await pilot.press("1")
        await settle(app, pilot)
        app.screen.query_one("#events", EventPanel).focus()
        await pilot.press("slash", *"21/", "enter")
        await settle(app, pilot)
        assert "21/100 · loss 2.5" in text_of(app), "a filter finds them"


async def test_a_line_of_the_log_is_copied_whole(open_app: OpenApp) -> None:
    async with open_app(size=(80, 24)) as (app, pilot, run):
        run.log("CUDA error: " + "far too long for a line of this screen " * 4, "error", 1)
        run.log("the newest")
        await pilot.press("6")
        await settle(app, pilot)
        await pilot.press("y")
        assert app.clipboard == "the newest"
        await pilot.press("slash", *"far", "enter")
        await settle(app, pilot)
        await pilot.press("p", "y")
        assert app.clipboard.startswith("CUDA error: far") and app.clipboard.count("far") == 4


async def test_logs_filter_by_level_and_rank_search_and_cut(open_app: OpenApp) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        run.log("all quiet", "info", 0)
        run.log("loss scale halved", "warning", 1)
        run.log("the loss is fine")
        run.log("CUDA error", "error", 1)
        run.log("long " * 60, "info", 0)
        await pilot.press("C")
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await pilot.press("6")
        await settle(app, pilot)
        log = app.screen.query_one(LogPanel)
        assert (
            "all quiet" in text_of(app) and "checkpoint · applied at step 20" in text_of(app) and " by " in text_of(app)
        )
        await pilot.press("v", "v", "v")
        await settle(app, pilot)
        assert log.level == "warning" and "all quiet" not in text_of(app) and "loss scale halved" in text_of(app)
        await pilot.press("v", "v")
        lines = len(log._lines)
        await pilot.press("b")
        await settle(app, pilot)
        assert len(log._lines) < lines and "long lines cut" in text_of(app)
        await pilot.press("i", "i")
        await settle(app, pilot)
        assert log.rank == 1 and "CUDA error" in text_of(app) and "all quiet" not in text_of(app)
        await pilot.press("i")
        await pilot.press("slash", *"loss", "enter")
        await settle(app, pilot)
        assert log.filter == "loss" and "all quiet" in text_of(app), "a search leaves the other lines"
        marked = [s.text for strip in log.render_lines(log.size.region) for s in strip if s.style and s.style.bold]
        assert "loss" in marked
        first = str(log.border_title)
        await pilot.press("p")
        assert str(log.border_title) != first
        await pilot.press("n", "m")
        await settle(app, pilot)
        assert str(log.border_title).startswith(first) and "all quiet" not in text_of(app)
        await pilot.press("escape")
        assert log.filter == ""


async def test_settings_tell_where_a_value_came_from_and_enter_changes_it(open_app: OpenApp) -> None:
    async with open_app(size=(160, 44)) as (app, pilot, run):
        await pilot.press("7")
        await settle(app, pilot)
        assert "zerotop.log.interval in the config, or its default" in text_of(
            app
        ) and "at the end of step 21" in text_of(app)
        await pilot.press("down", "enter")
        await pilot.pause()
        assert isinstance(app.screen, KnobScreen) and app.screen.query_one(Input).has_focus
        await pilot.press("7", "enter")
        await settle(app, pilot)
        assert [(c.name, c.arguments) for c in run.sent] == [("set", {"log_interval": 7})]
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        assert "7 steps" in text_of(app) and "set at step 20" in text_of(app)


async def test_a_read_only_screen_shows_a_lock_and_changes_nothing(open_app: OpenApp) -> None:
    async with open_app(read_only=True) as (app, pilot, run):
        assert "⊘ locked, read-only" in text_of(app)
        await pilot.press("7", "enter")
        await settle(app, pilot)
        assert "⊘ locked: read-only" in text_of(app) and not isinstance(app.screen, KnobScreen)
        await pilot.press("P", "C", "E", "S", "A", "T", "R", "M")
        assert run.sent == [] and isinstance(app.screen, PageScreen)


async def test_enter_opens_the_screen_that_a_panel_names_and_j_and_k_are_down_and_up(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(60)
    async with open_app(run) as (app, pilot, _):
        for panel, page in (("speed", "5"), ("memory", "2"), ("events", "6")):
            await pilot.press("1")
            app.screen.query_one(f"#{panel}").focus()
            await pilot.press("enter")
            await settle(app, pilot)
            assert app.page is not None and page == app.page.KEY
        log = app.screen.query_one("#log", LogPanel)
        for _ in range(60):
            run.log("one more line", "warning")
        await settle(app, pilot)
        log.focus()
        at = log.scroll_offset.y
        await pilot.press("k", "k", "j")
        assert log.scroll_offset.y == at - 1
        await pilot.press("1")
        app.screen.query_one(RankTable).focus()
        await pilot.press("enter")
        await settle(app, pilot)
        app.screen.query_one("#collectives").focus()
        await pilot.press("enter")
        assert app.page is not None and app.page.KEY == "4"
        await pilot.press("question_mark", "j", "j", "k")
        await pilot.pause()
        assert app.screen.query_one(VerticalScroll).scroll_y == 1
        await pilot.press("escape", "t", "j")
        assert app.theme != "dark"
        await pilot.press("k")
        assert app.theme == "dark"


async def test_ranks_are_sorted_filtered_and_the_blamed_one_is_in_sight(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=64, gpu=True)
    run.steps(30)
    async with open_app(run, size=(160, 40)) as (app, pilot, _):
        await pilot.press("x")  # the grid is what opens
        await settle(app, pilot)
        table = app.screen.query_one(RankTable)
        assert table._order[0] == 63 and any("  63 cuda:63" in line for line in screen_text(app))
        assert any(" med " in line for line in screen_text(app))
        await pilot.press("s")
        assert table.sort == "cost to others" and table._order[0] == 63 and "sorted by cost" in str(table.border_title)
        await pilot.press("s", "s", "s")
        assert table.sort == "tokens/s"
        await pilot.press("s", "r")
        assert table.sort == "util" and table._order[0] == 7, "the lowest utilisation first"
        await pilot.press("slash", *"cuda:4", "enter")
        assert table.filter == "cuda:4" and set(table._order) == {4, *range(40, 50)}
        await pilot.press("escape")
        assert table.filter == "" and len(table._order) == 64


async def test_panels_are_hidden_and_shown_again(open_app: OpenApp) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, _):
        events = app.screen.query_one("#events")
        events.focus()
        await pilot.press("h")
        await settle(app, pilot)
        assert not events.region.area and app.focused is not events
        await pilot.press("u")
        await settle(app, pilot)
        assert events.region.area


async def test_a_border_is_dragged_with_the_mouse_and_u_undoes_it(open_app: OpenApp) -> None:
    async with open_app(size=(120, 44)) as (app, pilot, _):
        plot, speed = app.screen.query_one("#learning"), app.screen.query_one("#speed")
        before = (plot.region.width, speed.region.width)
        edge, row = speed.region.x, speed.region.y + 3
        await pilot.mouse_down(offset=(edge, row))
        await pilot.hover(offset=(edge + 8, row))
        await pilot.mouse_up(offset=(edge + 8, row))
        await settle(app, pilot)
        assert plot.region.width == before[0] + 8 and speed.region.width == before[1] - 8
        await pilot.press("u")
        await settle(app, pilot)
        assert (plot.region.width, speed.region.width) == before


async def test_a_wide_terminal_shows_two_screens_side_by_side(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=64, gpu=True)
    run.steps(40)
    async with open_app(run, size=(300, 80)) as (app, pilot, _):
        text = text_of(app)
        assert "5 loss" in text and "gradient norm" in text and "learning rate" in text
        assert len(app.screen.query_one(RankGrid)._places) == 64
        await pilot.press("x")
        await settle(app, pilot)
        assert sum("cuda:" in line for line in screen_text(app)) >= 45
        await pilot.resize_terminal(200, 50)
        await settle(app, pilot)
        assert "learning rate" not in text_of(app)


@pytest.mark.parametrize(("state", "word"), [("finished", "✔ finished"), ("failed", "✖ failed"), ("stopped", "■")])
async def test_a_run_that_has_ended_shows_its_summary(open_app: OpenApp, state: str, word: str) -> None:
    run = ScriptedRun(ranks=2, finetune=True)
    run.steps(120)
    run.status(state, ended_wall_s=run.wall_s, reason="RuntimeError: no" if state == "failed" else "", failed_rank=1)
    for size in ((80, 24), (120, 38), (200, 50)):
        async with open_app(run, size=size) as (app, _, _):
            text = text_of(app)
            assert word in text and "trained" in text and "120 of 200 steps" in text, size
            assert "zerotop status q1 --json" in text, size
            if state != "finished":
                assert "zerotop launch --resume --name q1" in text, size
            if size[0] > 80:
                assert "48 s" in text and "tokens/s" in text and "◆" in text and "perplexity" in text, size
