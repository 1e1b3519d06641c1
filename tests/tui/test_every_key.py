"""Every key of the table, on every kind of screen: it changes something that can be seen, or it is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.pilot import Pilot

from tests.harness.longrun import SpokenRun, write
from tests.harness.waiting import until_async
from tests.tui.screen_reading import screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.source.replay import ReplaySource
from zerotop.tui.app import Outcome, ZerotopApp
from zerotop.tui.keys import KEYS, PAGE_NAMES, Key
from zerotop.tui.lens import Lens
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.panels.log import LogPanel
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.replay import ReplayApp
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.screens.texts import TextScreen

PLACES = (*PAGE_NAMES, "rank", "texts", "replay")
ZOOMED = Lens(cursor=40, first=20.0, last=40.0)
"""So zoomed, every key of the axis has something to do."""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of the screen go there."""
    monkeypatch.setenv("XDG_PICTURES_DIR", str(tmp_path))
    monkeypatch.setenv("PAGER", "true")


def a_run() -> ScriptedRun:
    run = ScriptedRun(ranks=3, gpu=True, finetune=True)
    run.steps(60)
    for number in range(3):
        run.log(f"needle {number}", "warning", number)
    return run


@asynccontextmanager
async def open_place(place: str, tmp_path: Path) -> AsyncIterator[tuple[ZerotopApp, Pilot[Outcome], list[Any]]]:
    """The app with the place on top, and the list of what it has sent."""
    source: ReplaySource | None = None
    run = a_run()
    if place == "replay":
        spoken = SpokenRun(ranks=2)
        for _ in range(60):
            spoken.second()
        source = ReplaySource(write(tmp_path / "recorded", spoken), "q1", lambda: 100.0)
        source.start()
    app = ReplayApp(source) if source is not None else ZerotopApp(run)
    app.clock = lambda: run.wall_s
    app.action_detach = lambda: run.sent.append("left")  # type: ignore[method-assign, arg-type, return-value]
    async with app.run_test(size=(110, 32)) as pilot:
        await settle(app, pilot)
        for key in {"rank": ("enter",), "texts": ("w",), "replay": ()}.get(place, (place,)):
            await pilot.press(key)
            await settle(app, pilot)
        if isinstance(app, ReplayApp):
            app.action_skip(50)
            await settle(app, pilot)
        yield app, pilot, run.sent
    if source is not None:
        source.close()


def seen(app: ZerotopApp, sent: list[Any]) -> tuple[object, ...]:
    """Whatever a key may change."""
    return (
        screen_text(app),
        tuple(type(screen).__name__ for screen in app.screen_stack),
        app.current_mode,
        app.focused,
        app.theme,
        app.lens,
        app.is_frozen,
        len(sent),
        len(app._notifications),
        app.clipboard,
    )


async def prepare(app: ZerotopApp, place: str, key: Key) -> None:
    """Give a key that undoes or moves something what it undoes or moves."""
    app.set_lens(ZOOMED)
    if place == "6":
        log = app.screen.query_one(LogPanel)
        log.rank, log.level, log.only_matches = None, "quiet", False
        log.forget()
        log.set_filter("needle" if "match" in key.action else "")
    if key.id == "unhide":
        app.action_hide()
        hidden = app.screen.query(".-hidden")
        await until_async(lambda: not any(panel.region for panel in hidden), "the panel is hidden")


async def restore(app: ZerotopApp, pilot: Pilot[Outcome], place: str) -> None:
    """As it was before the key."""
    while not isinstance(app.screen, LiveScreen):
        app.pop_screen()
        await pilot.pause()
    app.theme = "dark"
    app.clear_notifications()
    if app.is_frozen:
        app.action_freeze()
    if isinstance(app.screen, PageScreen):
        app.screen.close_filter()
        page = app.screen.page
        if isinstance(page, OverviewPage) and isinstance(page.ranks, RankGrid):
            page.switch_ranks()  # the grid has the arrows for itself
        app.screen.set_focus(page.first_focus())
    app.screen.unzoom()
    app.screen.show_all()


def key_event(key: Key) -> events.Key:
    """The key as a terminal sends it: a pilot would wait longer."""
    name = key.keys.split(",")[0]
    return events.Key(name, name if len(name) == 1 else None)


def steps(key: Key) -> tuple[str, tuple[object, ...]]:
    """(name, parameters) of the key's action."""
    name, _, rest = key.action.partition("(")
    return name, (rest[:-1].strip("'"),) if rest else ()


async def changes(app: ZerotopApp, sent: list[Any], before: tuple[object, ...]) -> bool:
    """Whether something is different from `before`, now or a moment later."""
    try:
        await until_async(lambda: seen(app, sent) != before, deadline_s=1)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "place",
    # Tables and texts have no keys of their own.
    [pytest.param(place, marks=pytest.mark.slow if place in ("2", "4", "7", "8", "texts") else ()) for place in PLACES],
)
async def test_every_key_does_something_or_is_refused(place: str, tmp_path: Path) -> None:
    wrong: list[str] = []
    async with open_place(place, tmp_path) as (app, pilot, sent):

        def home() -> object:
            return app.current_mode, [type(one) for one in app.screen_stack]

        at_home = home()
        for key in KEYS:
            if key.group == "screens" and place not in ("1", "rank", "replay"):
                continue  # to open them all takes a second, and is the same everywhere
            if not app.check_action(*steps(key)):
                app.post_message(key_event(key))
                await pilot.pause()
                assert home() == at_home and app.is_running, key
                continue
            await prepare(app, place, key)
            await settle(app, pilot)
            await until_async(lambda: not app._busy)  # a key waits for the one before it
            before = seen(app, sent)
            here = key.action == f"page('{place if place in PAGE_NAMES else '1'}')"
            app.post_message(key_event(key))
            await settle(app, pilot)
            await until_async(lambda: not app._busy)
            await settle(app, pilot)
            if not here and not await changes(app, sent, before):
                wrong.append(f"{key.keys} ({key.action})")
            await restore(app, pilot, place)
            while home() != at_home:
                app.action_page(place if place in PAGE_NAMES else "1")
                await settle(app, pilot)
                if place in ("rank", "texts"):
                    app.open_over(RankScreen(app.palette, 0) if place == "rank" else TextScreen(app.palette))
                    await settle(app, pilot)
    assert not wrong, f"allowed, and nothing happened: {wrong}"
