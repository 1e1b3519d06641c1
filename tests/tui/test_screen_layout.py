"""Where the panels lie, at the sizes that the screen promises to work at, and how they are reached."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.pages.memory import MemoryPage
from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.widgets.lines import Panel, ScrollPanel


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
@pytest.mark.parametrize(("ranks", "gpu"), [(2, False), (8, True), (64, True)])
async def test_every_panel_lies_inside_the_terminal(
    open_app: OpenApp, size: tuple[int, int], ranks: int, gpu: bool
) -> None:
    run = ScriptedRun(ranks=ranks, gpu=gpu)
    run.steps(20)
    async with open_app(run, size=size) as (app, _, _):
        panels = [p for p in (*app.screen.query(Panel), *app.screen.query(ScrollPanel)) if p.region.area]
        shown = "grid" if ranks > 16 else "ranks"
        assert {"header", shown, "learning", "speed", "events"} <= {panel.id for panel in panels}
        for panel in panels:
            assert panel.region in app.screen.region, panel
            for other in panels:
                assert panel is other or not panel.region.overlaps(other.region), (panel, other)
        text = screen_text(app)
        assert len(text) == size[1]
        assert all(cell_len(line) == size[0] for line in text)
        joined = "\n".join(text)
        assert "running" in joined and "step 20 of 200" in joined and "ZeRO-2" in joined
        assert text[-1].split()[:2] == ["?", "Help"]


async def test_eight_ranks_are_all_in_sight_in_a_small_terminal(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=8, gpu=True)
    run.steps(20)
    async with open_app(run, size=(80, 24)) as (app, _, _):
        rows = [line for line in screen_text(app) if "GiB" in line and "/4" in line]
        assert len(rows) == 8


async def test_zoom_gives_the_focused_panel_the_screen_and_takes_it_back(open_app: OpenApp) -> None:
    async with open_app(size=(80, 24)) as (app, pilot, _):
        plot = app.screen.query_one("#learning")
        plot.focus()
        await pilot.press("z")
        await settle(app, pilot)
        assert plot.region.width == 80 and plot.region.height >= 19
        assert plot.region in app.screen.region
        await pilot.press("escape")
        await settle(app, pilot)
        assert plot.region.width < 80
        # The memory panel has no place in this size: its number opens the screen that has more of it.
        await pilot.press("2")
        await settle(app, pilot)
        assert "parameters" in "\n".join(screen_text(app)) and app.page is app.screen.query_one(MemoryPage)


@pytest.mark.parametrize(("size", "ranks", "gpu"), [((120, 40), 2, False), ((120, 40), 2, True), ((160, 40), 8, True)])
async def test_nothing_moves_when_the_verdict_and_a_command_come(
    open_app: OpenApp, size: tuple[int, int], ranks: int, gpu: bool
) -> None:
    run = ScriptedRun(ranks=ranks, gpu=gpu)
    run.steps(2)
    async with open_app(run, size=size) as (app, pilot, _):
        run.say(*(rank.step for rank in run.state.ranks.values() if rank.step))

        def places() -> dict[str | None, object]:
            return {panel.id: panel.region for panel in (*app.screen.query(Panel), *app.screen.query(ScrollPanel))}

        before, text = places(), "\n".join(screen_text(app))
        assert "the others wait" not in text and "sent" not in text
        run.steps(20)
        await pilot.press("C")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "the others wait for rank" in text and "checkpoint: sent" in text
        assert places() == before
        for word in ("RAM ", "ranks ", "pinned ", "CPU ", "parameters", "~ derived"):
            assert word in text
        memory, host = app.screen.query_one(MemoryPanel), app.screen.query_one("#host")
        assert host.size.height >= 4 and memory.size.height == memory.lines_wanted


@pytest.mark.parametrize("size", [(80, 24), (120, 24), (200, 24), (120, 38)])
async def test_eight_ranks_and_their_failure_fit_every_size(open_app: OpenApp, size: tuple[int, int]) -> None:
    run = ScriptedRun(ranks=8, gpu=True)
    run.steps(20)
    async with open_app(run, size=size) as (app, pilot, _):

        def check(least: int) -> None:
            parts = [part for part in app.screen.query("PageScreen > *") if part.region.area and part.id]
            assert app.screen.max_scroll_y == 0 and sum(part.region.height for part in parts) == size[1] - 1
            assert all(part.region in app.screen.region for part in parts)
            assert sum(line.count("GiB") > 0 and "/4" in line for line in screen_text(app)) >= least

        check(8)
        run.steps(40)  # a slow rank is named in a line of its own
        await settle(app, pilot)
        check(8)
        trace = "".join(f'  File "x{line}.py", line {line}, in f\n' for line in range(9))
        run.fail(1, f"Traceback (most recent call last):\n{trace}ValueError: boom")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert text.count("ValueError: boom") == 1 and 'File "x8.py"' in text and "zerotop logs q1 --rank 1" in text
        assert "8 more: 6, then e opens the log" in text or size[1] > 24
        parts = [part for part in app.screen.query("PageScreen > *") if part.region.area and part.id]
        assert app.screen.max_scroll_y == 0 and all(part.region in app.screen.region for part in parts)
        assert app.screen.query_one(RankTable).size.height == 9 and app.screen.query_one(EventPanel).size.height >= 2
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.max_scroll_y == 0


async def test_titles_show_the_number_key_of_the_screen_that_has_more(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        for key, panel, page in (("5", "learning", "Training"), ("2", "memory", "Memory"), ("6", "events", "Logs")):
            assert app.page is not None and app.page.NAME == "Overview"
            assert str(app.screen.query_one(f"#{panel}").border_title).startswith(key)
            await pilot.press(key)
            await settle(app, pilot)
            assert app.page is not None and page == app.page.NAME
            await pilot.press("escape")
            await settle(app, pilot)
        await pilot.press("enter")
        await settle(app, pilot)
        titles = [str(panel.border_title) for panel in app.screen.query(Panel) if panel.border_title]
        assert [title[:2] for title in titles] == ["3 ", "4 ", "2 "]
        await pilot.press("4")
        await settle(app, pilot)
        assert app.page is not None and app.page.NAME == "Communication"


async def test_a_filter_is_typed_where_it_can_be_seen(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        app.screen.query_one("#events").focus()
        await pilot.press("z", "slash", *"ckpt")
        await settle(app, pilot)
        assert app.screen.maximized is app.screen.query_one("#events")
        assert any(line.strip() == "ckpt" for line in screen_text(app)) and "? Help" not in screen_text(app)[-2]
        await pilot.press("escape", "escape")
        app.screen.query_one("#learning").focus()
        await pilot.press("z", "slash", *"ckpt")
        await settle(app, pilot)
        assert app.screen.maximized is None and any(line.strip() == "ckpt" for line in screen_text(app))


async def test_any_size_draws_and_a_resize_lays_out_anew(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=8, gpu=True)
    run.steps(20)
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        for size in ((20, 5), (40, 12), (80, 24), (300, 90), (100, 20), (200, 50)):
            await pilot.resize_terminal(*size)
            await settle(app, pilot)
            text = screen_text(app)
            assert len(text) == size[1] and all(cell_len(line) == size[0] for line in text)
        assert sum("cuda:" in line for line in text) == 8
        assert app.screen.query_one("#memory").region.height >= 11
