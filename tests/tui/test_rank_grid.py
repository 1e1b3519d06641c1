"""The ranks as a grid: which of them it shows, what its cells say, and what keys and mouse do."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from textual.widgets import Input

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import GIB, ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.ascii import Plain, ascii_table
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.screens.rank import RankScreen


def many(ranks: int = 64, nodes: int = 8, gpu: bool = True, steps: int = 20) -> ScriptedRun:
    run = ScriptedRun(ranks=ranks, nodes=nodes, gpu=gpu)
    run.steps(steps)
    return run


def grid_of(app: ZerotopApp) -> RankGrid:
    return app.screen.query_one(RankGrid)


def cells_in_sight(app: ZerotopApp) -> int:
    """How many ranks have their cell on the screen."""
    grid = grid_of(app)
    lines = range(grid.scroll_offset.y, grid.scroll_offset.y + grid.scrollable_content_region.height - 1)
    right = grid.scrollable_content_region.width
    return sum(y in lines and x + grid._blocks.cell <= right for x, y in grid._places.values())


def line_of(app: ZerotopApp, text: str) -> str:
    return next(line for line in screen_text(app) if text in line)


# ---- table or grid ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "nodes", "size"),
    [(64, 8, (80, 24)), (64, 8, (120, 38)), (64, 1, (80, 24)), (512, 64, (200, 50)), (100, 1, (120, 38))],
)
async def test_the_grid_shows_every_rank_at_once(
    open_app: OpenApp, ranks: int, nodes: int, size: tuple[int, int]
) -> None:
    async with open_app(many(ranks, nodes, steps=3), size=size) as (app, _, _):
        grid = grid_of(app)
        assert grid.display and grid.has_focus and not app.screen.query_one(RankTable).display
        assert len(grid._places) == ranks == cells_in_sight(app) and not grid.show_vertical_scrollbar
        assert all(cell_len(line) == size[0] for line in screen_text(app))


async def test_the_table_can_be_hidden_after_it_came_back(open_app: OpenApp) -> None:
    async with open_app(many(8, 1), size=(120, 38)) as (app, pilot, _):
        table = app.screen.query_one(RankTable)
        for key in ("x", "x", "h"):
            await pilot.press(key)
            await settle(app, pilot)
        assert not table.display and not grid_of(app).display
        await pilot.press("u")
        await settle(app, pilot)
        assert table.display and not grid_of(app).display


@pytest.mark.parametrize(("ranks", "size"), [(16, (80, 24)), (8, (80, 24)), (32, (300, 80))])
async def test_a_table_that_is_short_or_shows_all_ranks_stays(
    open_app: OpenApp, ranks: int, size: tuple[int, int]
) -> None:
    async with open_app(many(ranks, 1, steps=3), size=size) as (app, _, _):
        assert not grid_of(app).display and app.screen.query_one(RankTable).has_focus


async def test_x_switches_and_takes_selection_filter_focus_and_zoom_along(open_app: OpenApp) -> None:
    async with open_app(many(8, 1), size=(120, 38)) as (app, pilot, _):
        table, grid = app.screen.query_one(RankTable), grid_of(app)
        await pilot.press("down", "down", "slash", *"cuda:2", "enter", "z")
        await settle(app, pilot)
        await pilot.press("x")
        await settle(app, pilot)
        assert grid.display and not table.display and grid.has_focus and app.screen.maximized is grid
        assert grid.selected == 2 and grid.filter == "cuda:2" and "1 of 8" in line_of(app, "fullest: ")
        await pilot.press("escape", "escape")
        await settle(app, pilot)
        assert grid.filter == "" and app.screen.maximized is None
        await pilot.press("right", "x")
        await settle(app, pilot)
        assert table.display and table.has_focus and table.selected == 3 and not grid.display


async def test_what_was_chosen_stays_when_the_terminal_changes(open_app: OpenApp) -> None:
    async with open_app(many(), size=(120, 38)) as (app, pilot, _):
        await pilot.press("x")
        for size in ((80, 24), (200, 50), (20, 6), (120, 38)):
            await pilot.resize_terminal(*size)
            await settle(app, pilot)
            assert app.screen.query_one(RankTable).display
        await pilot.press("x")
        for size in ((80, 24), (20, 6), (300, 80)):
            await pilot.resize_terminal(*size)
            await settle(app, pilot)
            assert grid_of(app).display
            assert all(cell_len(line) == size[0] for line in screen_text(app))


# ---- cells -----------------------------------------------------------------------------------------------------------
async def test_the_title_has_the_figure_its_range_and_the_worst_rank(open_app: OpenApp) -> None:
    run = many()
    run.gpu_changes[13] = {"temperature_c": 86.0}
    run.node()
    async with open_app(run, size=(120, 38)) as (app, pilot, _):
        assert "64 ranks · VRAM, % of the device · min 21%, median 22%, max 22% · fullest: rank" in line_of(app, "min ")
        seen = [line_of(app, "min ")]
        for _ in range(7):
            await pilot.press("g")
            await settle(app, pilot)
            seen.append(line_of(app, "min "))
        assert "temperature, °C · min 61°C, median 64°C, max 86°C · hottest: rank 13" in seen[2]
        assert "lowest: rank 7" in seen[1] and "640 W" in seen[3] and "costliest: rank 63" in seen[4]
        assert "waiting" in seen[5] and "step time" in seen[6] and "tokens/s" in seen[7]
        await pilot.press("g")
        await settle(app, pilot)
        assert grid_of(app)._cells and "VRAM" in line_of(app, "min ")


async def test_figures_that_a_cpu_run_does_not_have_are_left_out(open_app: OpenApp) -> None:
    async with open_app(many(24, 3, gpu=False), size=(120, 38)) as (app, _, _):
        titles = [figure.title for figure in grid_of(app)._read_figures]
        assert titles[0] == "RSS, % of the largest"
        assert not any(word in title for title in titles for word in ("VRAM", "utilisation", "temperature", "power"))
        assert len(titles) == 5


async def test_cells_without_colour_say_who_is_blamed_alarming_failed_and_unknown(open_app: OpenApp) -> None:
    run = many()
    run.gpu_changes = {9: {"temperature_c": 86.0, "clock_reasons": ["hot (hardware)"]}}
    run.node()
    async with open_app(run, size=(120, 38)) as (app, pilot, _):
        await pilot.press("g", "g")
        await settle(app, pilot)
        assert "! 86" in line_of(app, "node-1 ")
        for _ in range(10):
            run.steps(1)
            await settle(app, pilot)
        named = app.make_view().verdict
        assert named is not None and named.severity == "warning" and named.ranks
        x, y = grid_of(app)._places[named.ranks[0]]
        line = screen_text(app)[grid_of(app).scrollable_content_region.y + y]
        assert line[grid_of(app).scrollable_content_region.x + x] == "▲", "the one that the verdict names"
        run.gpu_changes[3] = {"lost": True}
        run.node()
        await settle(app, pilot)
        assert "·   65" in line_of(app, "node-0 "), "a GPU that is lost has no temperature"
        run.fail(1, "ValueError: boom")
        await settle(app, pilot)
        assert "✖" in line_of(app, "node-0 ")


async def test_narrow_cells_have_digits_and_everything_is_ascii(open_app: OpenApp) -> None:
    async with open_app(many(512, 64, steps=3), size=(80, 24)) as (app, pilot, _):
        grid = grid_of(app)
        assert grid._blocks.cell < 3 and grid.show_vertical_scrollbar
        await pilot.press("end")
        await settle(app, pilot)
        assert grid.selected == 511 and "rank 511" in "\n".join(screen_text(app)), "it scrolls where not all fit"
        plain = "\n".join(screen_text(app)).translate(Plain(ascii_table()))
        assert plain.isascii() and "?" not in plain.replace("? Help", "")


async def test_only_changed_cells_are_drawn_and_nothing_without_news(open_app: OpenApp) -> None:
    run = many()
    async with open_app(run, size=(120, 38)) as (app, pilot, _):
        grid = grid_of(app)
        await settle(app, pilot)
        draws: list[int] = []
        real = grid.draw
        grid.draw = lambda *given: draws.append(1) or real(*given)  # type: ignore[method-assign, func-returns-value]
        run.log("what a log says changes no cell")
        await settle(app, pilot)
        assert not draws
        before = list(grid._shown or [])
        memory = run.state.ranks[20].memory
        assert memory is not None
        run.say(memory.model_copy(update={"device_used_bytes": 139 * GIB, "allocated_bytes": 130 * GIB}))
        await settle(app, pilot)
        after = grid._shown or []
        changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
        assert len(draws) == 1 and len(changed) == 1 and "fullest: rank 20" in line_of(app, "min ")


# ---- keys and mouse --------------------------------------------------------------------------------------------------
async def test_arrows_letters_and_the_mouse_select_and_enter_opens(open_app: OpenApp) -> None:
    async with open_app(many(), size=(120, 38)) as (app, pilot, _):
        grid = grid_of(app)
        for key, rank in (
            ("right", 1), ("l", 2), ("down", 18), ("j", 34), ("k", 18), ("up", 2), ("h", 1), ("left", 0), ("left", 0),
            ("end", 63), ("right", 63), ("pageup", 15), ("home", 0), ("pagedown", 48),
        ):  # fmt: skip
            await pilot.press(key)
            assert grid.selected == rank, key
        await settle(app, pilot)
        assert app.screen.query_one(MemoryPanel).rank == 48
        x, y = grid._places[29]
        await pilot.click(grid, offset=(x + grid.gutter.left + 1, y + grid.gutter.top))
        await settle(app, pilot)
        assert grid.selected == 29 and "rank 29 " in line_of(app, "rank 29")
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.rank == 29
        await pilot.press("escape")
        await settle(app, pilot)
        await pilot.click(grid, offset=(x + grid.gutter.left + 1, y + grid.gutter.top), times=2)
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen)


async def test_a_filter_leaves_places_and_the_cursor_goes_along_its_matches(open_app: OpenApp) -> None:
    async with open_app(many(), size=(120, 38)) as (app, pilot, _):
        grid = grid_of(app)
        places = dict(grid._places)
        await pilot.press("slash", *"node-2")
        await settle(app, pilot)
        assert isinstance(app.focused, Input)
        await pilot.press("enter")
        await settle(app, pilot)
        assert grid._places == places and "filter “node-2” · 8 of 64" in line_of(app, "8 of 64")
        assert line_of(app, "node-1 ").count("·") >= 8
        await pilot.press("home", "right")
        assert grid.selected == 17
        await pilot.press("slash", *"nothing", "enter", "right", "down", "end")
        await settle(app, pilot)
        assert "0 of 64" in line_of(app, "0 of 64") and grid.selected == 17
        await pilot.press("escape")
        await settle(app, pilot)
        assert grid.filter == "" and "of 64" not in line_of(app, "median")


async def test_sorted_the_worst_stands_first_with_its_number(open_app: OpenApp) -> None:
    async with open_app(many(), size=(120, 38)) as (app, pilot, _):
        grid = grid_of(app)
        await pilot.press("g", "g", "s")
        await settle(app, pilot)
        assert [rank for rank, place in grid._places.items() if place[1] == 0][:3] == [7, 15, 23]
        assert "sorted ▼" in line_of(app, "hottest: rank 7") and "68°C" in line_of(app, " 15 ")
        await pilot.press("r")
        await settle(app, pilot)
        assert next(iter(grid._places)) == 56 and "sorted ▲" in line_of(app, "hottest: rank 7")
        await pilot.press("s")
        await settle(app, pilot)
        assert list(grid._places)[:2] == [0, 1] and "sorted" not in line_of(app, "hottest: rank 7")


async def test_help_footer_and_palette_have_the_key(open_app: OpenApp) -> None:
    async with open_app(many(), size=(200, 50)) as (app, pilot, _):
        assert "x Table" in screen_text(app)[-1]
        await pilot.press("x")
        await settle(app, pilot)
        assert "x Grid" in screen_text(app)[-1]
        assert any(command.title == "Grid" for command in app.get_system_commands(app.screen))
        await pilot.press("question_mark")
        await settle(app, pilot)
        assert "the ranks as a grid" in "\n".join(screen_text(app))
    async with open_app(many(4, 1), size=(200, 50)) as (app, _, _):
        assert "x Grid" not in screen_text(app)[-1], "so few ranks need none"
