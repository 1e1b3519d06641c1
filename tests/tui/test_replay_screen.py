"""The replay on the screen: its bar, its keys, and going to a moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from tests.harness.longrun import two_minutes
from tests.harness.waiting import until_async
from tests.tui.screen_reading import screen_text, settle
from zerotop.source.replay import ReplaySource
from zerotop.tui.app import Outcome
from zerotop.tui.panels.plots import PlotPanel
from zerotop.tui.panels.timebar import TimeBar
from zerotop.tui.replay import ReplayApp
from zerotop.tui.screens.goto import GoToScreen
from zerotop.tui.screens.rank import RankScreen


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return two_minutes(tmp_path / "run")


@asynccontextmanager
async def open_replay(
    folder: Path, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[tuple[ReplayApp, Pilot[Outcome], Clock]]:
    clock = Clock()
    source = ReplaySource(folder, "q1", clock)
    source.start()
    app = ReplayApp(source)
    async with app.run_test(size=size) as pilot:
        await until_async(lambda: app.screen.query(TimeBar) and "frame" in bar(app))
        yield app, pilot, clock
    source.close()


async def see(condition: Callable[[], object]) -> None:
    """Wait until the screen shows it: a key takes some messages, and a busy machine some time."""
    await until_async(condition)


def bar(app: ReplayApp) -> str:
    """The lines of the time bar; empty before there is one."""
    bars = app.screen.query(TimeBar)
    if not bars:
        return ""
    region = bars.first().region
    return "\n".join(screen_text(app)[region.y : region.bottom])


@pytest.mark.parametrize(("size", "lines"), [((80, 24), 1), ((120, 40), 2), ((200, 50), 2), ((60, 16), 1)])
async def test_the_bar_stands_above_the_footer_at_every_size(recorded: Path, size: tuple[int, int], lines: int) -> None:
    async with open_replay(recorded, size) as (app, _pilot, _):

        def in_place() -> bool:
            region = app.screen.query_one(TimeBar).region
            fits = (region.bottom, region.height, region.width) == (size[1] - 1, lines, size[0])
            return fits and app.screen.query_one("#events").region.bottom <= region.y

        await see(in_place)
        await see(lambda: "REPLAY" in bar(app) and "frame 1/121" in bar(app) and "1x" in bar(app))
        await see(lambda: any(line.rstrip().endswith("replay") for line in screen_text(app)[:3]))


async def test_the_keys_of_the_player(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, clock):
        await pilot.press("]")
        await see(lambda: app.source.state.step == 2 and "frame 2/121" in bar(app))
        await pilot.press("[")
        await see(lambda: app.source.state.step == 1)
        await pilot.press("k")
        await see(lambda: app.source.state.step == 11)
        await pilot.press("j", "+", "+")
        await see(lambda: app.source.state.step == 1 and "4x" in bar(app))
        await pilot.press("-")
        await see(lambda: "2x" in bar(app))
        await pilot.press("space")
        clock.now_s += 10
        await settle(app, pilot)
        await see(lambda: app.source.state.step == 21 and "▶ REPLAY" in bar(app))
        await pilot.press("space")
        clock.now_s += 10
        await settle(app, pilot)
        await see(lambda: app.source.state.step == 21 and "‖ REPLAY" in bar(app))


async def test_a_panel_keeps_the_keys_that_it_has_a_use_for(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await pilot.press("k", "k", "k", "5")
        await settle(app, pilot)
        await see(lambda: isinstance(app.focused, PlotPanel))
        await pilot.press("+")
        await settle(app, pilot)
        assert not app.lens.whole and "1x" in bar(app)
        await pilot.press("n")
        await see(lambda: "now ● checkpoint at step 50" in bar(app))
        await pilot.press("}")
        await see(lambda: "2x" in bar(app))
        await pilot.press("{")
        await see(lambda: "1x" in bar(app))
        await pilot.press("1")
        await settle(app, pilot)
        await pilot.press("+")
        await see(lambda: "2x" in bar(app))


async def test_n_goes_to_a_match_where_there_are_some(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await pilot.press(".")
        await see(lambda: "now ● checkpoint at step 50" in bar(app))
        await pilot.press("6", "slash", *"step", "enter")
        await settle(app, pilot)
        step = app.source.state.step
        await pilot.press("n")
        await settle(app, pilot)
        assert app.source.state.step == step
        await pilot.press(".")
        await see(lambda: app.source.state.step > step)
        await pilot.press(",")
        await see(lambda: app.source.state.step == step)


async def test_from_event_to_event_and_what_happens_there(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await see(lambda: "next in" in bar(app) and "checkpoint at step 50" in bar(app))
        await pilot.press("n")
        await see(lambda: "now ● checkpoint at step 50" in bar(app))
        await pilot.press("n")
        await see(lambda: "now ▲ rank 1 is slow in data loading" in bar(app) and app.source.state.step == 72)
        await pilot.press("N")
        await see(lambda: app.source.state.step == 51)
        await pilot.press("n", "n", "n")
        await see(lambda: any("no later event" in note.message for note in app._notifications))


async def test_going_to_a_moment(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await pilot.press("g", "9", "9", "9")
        await see(lambda: isinstance(app.screen, GoToScreen))
        await see(lambda: "no step 999" in "\n".join(screen_text(app)))
        await pilot.press("enter")
        await see(lambda: isinstance(app.screen, GoToScreen))
        app.screen.query_one(Input).value = "step 90"
        await pilot.press("enter")
        await settle(app, pilot)
        await see(lambda: app.source.state.step == 90 and not isinstance(app.screen, GoToScreen))
        await pilot.press("g", "-", "1", "0", "s", "enter")  # keys of the player are letters here
        await settle(app, pilot)
        await see(lambda: app.source.state.step == 112)
        await pilot.press("g", "escape")
        await see(lambda: app.source.state.step == 112)


async def test_the_player_works_on_a_ranks_page_and_not_in_a_field(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await pilot.press("enter")
        await settle(app, pilot)
        await see(lambda: isinstance(app.screen, RankScreen) and "REPLAY" in bar(app))
        await pilot.press("]")
        await see(lambda: app.source.state.step == 2)
        await pilot.press("escape", "slash", "k", "n", "]")
        await see(lambda: app.screen.query_one("#filter", Input).value == "kn]" and app.source.state.step == 2)


async def test_nothing_of_a_replay_steers_and_the_help_has_its_keys(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await pilot.press("P", "S", "A")
        assert len(app.screen_stack) == 1 and not app.source.state.commands
        await pilot.press("question_mark")
        text = "\n".join(screen_text(app))
        assert "play or pause" in text and "this is a replay: nothing reaches the run" in text
        await pilot.press("escape", "q")
    assert app.return_value == "ended"


async def test_the_footer_says_what_space_does(recorded: Path) -> None:
    async with open_replay(recorded) as (app, pilot, _):
        await see(lambda: "space Play" in screen_text(app)[-1])
        await pilot.press("space")
        await settle(app, pilot)
        await see(lambda: "space Pause" in screen_text(app)[-1])


async def test_the_bar_is_there_before_anything_happens(recorded: Path) -> None:
    source = ReplaySource(recorded, "q1", Clock())
    source.start()
    app = ReplayApp(source)
    async with app.run_test(size=(120, 40)):
        await until_async(lambda: app.screen.query(TimeBar) and "frame 1/121" in bar(app))
    source.close()
