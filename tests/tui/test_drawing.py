"""What is drawn, and what is sent to the terminal: only what has changed, and all of that."""

from __future__ import annotations

from collections import Counter

import pytest
from rich.segment import Segment
from textual.app import App
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget

from tests.tui.conftest import settle
from tests.tui.screen_reading import OpenApp, screen_text
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES
from zerotop.tui.narrow import NarrowCompositor, NarrowUpdate
from zerotop.tui.pagekeys import HOLD_S, import_pages
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.widgets import lines
from zerotop.tui.widgets.lines import Panel, ScrollPanel


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Name of a panel's class -> how often one has been drawn."""
    import_pages()
    counted: Counter[str] = Counter()

    def count(kind: type[Panel | ScrollPanel]) -> None:
        draw = kind.draw

        def counting(self: Panel | ScrollPanel, *arguments: object) -> object:
            counted[type(self).__name__] += 1
            return draw(self, *arguments)  # type: ignore[arg-type]

        if "draw" in vars(kind):
            monkeypatch.setattr(kind, "draw", counting)
        for more in kind.__subclasses__():
            count(more)

    for kind in (Panel, ScrollPanel):
        count(kind)
    return counted


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[NarrowUpdate]:
    """What would have been sent to the terminal."""
    sent: list[NarrowUpdate] = []
    render = NarrowCompositor.render_partial_update

    def keep(self: NarrowCompositor) -> NarrowUpdate | None:
        update = render(self)
        sent.extend([update] if update is not None else [])
        return update

    monkeypatch.setattr(NarrowCompositor, "render_partial_update", keep)
    return sent


async def test_a_panel_is_drawn_only_if_what_it_reads_has_changed(open_app: OpenApp, draws: Counter[str]) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        app.clock = lambda: run.wall_s  # the header has the time of day
        for micro in (1, 2):  # what the first ticks have found out may have moved panels, and shown scroll bars
            run.beat(0, "backward", micro)
            await settle(app, pilot)
        draws.clear()
        run.beat(0, "backward", 3)
        app.tick()
        await pilot.pause()
        assert draws == {"RankTable": 1}
        draws.clear()
        run.node()
        app.tick()
        await pilot.pause()
        assert {"HostPanel", "RankTable"} <= draws.keys() and not {"Header", "PlotPanel", "EventPanel"} & draws.keys()
        draws.clear()
        run.log("a line")
        app.tick()
        await pilot.pause()
        assert draws.keys() == {"EventPanel"}


async def test_a_page_that_is_not_shown_is_not_drawn(open_app: OpenApp, draws: Counter[str]) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        await pilot.press("2")
        await settle(app, pilot)
        assert draws["MemoryBars"]
        await pilot.press("1")
        await settle(app, pilot)
        draws.clear()
        run.steps(2)
        run.node()
        app.tick()
        await pilot.pause()
        assert draws["RankTable"] and not draws["MemoryBars"] and not draws["PeakPanel"]


async def test_a_panel_out_of_sight_is_drawn_when_it_comes_in_sight(open_app: OpenApp, draws: Counter[str]) -> None:
    async with open_app(size=(80, 24)) as (app, pilot, run):
        draws.clear()
        run.steps(1)
        app.tick()
        await pilot.pause()
        assert "MemoryPanel" not in draws
        await pilot.resize_terminal(120, 40)
        await pilot.pause()
        memory = app.screen.query_one(MemoryPanel)
        assert memory.region.area and "MemoryPanel" in draws
        assert "parameters" in "".join(memory.render_line(y).text for y in range(memory.size.height))


async def test_a_tick_that_changes_the_clock_alone_repaints_one_line(
    open_app: OpenApp, updates: list[NarrowUpdate]
) -> None:
    run = ScriptedRun()
    run.steps(20)
    async with open_app(run, size=(160, 40)) as (app, pilot, _):
        now_s = run.wall_s + 61.0
        app.clock = lambda: now_s
        app.update_view()
        await pilot.pause()
        updates.clear()
        now_s += 0.4
        app.update_view()
        await pilot.pause()
        nothing, now_s = list(updates), now_s + 1.0
        assert nothing == []
        app.update_view()
        await pilot.pause()
        header = app.screen.query_one("#header")
        assert {y for update in updates for y, _, _ in update.pieces} == {header.region.y}


async def test_a_title_that_changes_repaints_no_other_line(open_app: OpenApp, updates: list[NarrowUpdate]) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, _):
        plot = app.screen.query_one("#learning", Panel)
        updates.clear()
        plot.entitle(f"{plot._title}5")
        await pilot.pause()
        (piece,) = [piece for update in updates for piece in update.pieces]
        assert piece[0] == plot.region.y and "5" in piece[2].text and piece[2].cell_length < 10


async def test_a_log_line_lays_out_nothing(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        for number in range(60):
            run.log(f"line {number}")
        await settle(app, pilot)
        laid_out: list[Screen[object]] = []
        lay_out = Screen._refresh_layout

        def counting(self: Screen[object], size: Size | None = None, scroll: bool = False) -> None:
            laid_out.append(self)
            lay_out(self, size, scroll)

        monkeypatch.setattr(Screen, "_refresh_layout", counting)
        run.log("one more")
        app.tick()
        await pilot.pause()
        events = app.screen.query_one("#events", ScrollPanel)
        assert "one more" in events.render_line(events.size.height - 1).text
        assert events.vertical_scrollbar.window_virtual_size == events.virtual_size.height > 60
        assert not laid_out


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 50)])
async def test_what_is_sent_makes_the_whole_screen(
    open_app: OpenApp, updates: list[NarrowUpdate], size: tuple[int, int]
) -> None:
    run = ScriptedRun(ranks=3, gpu=True, finetune=True)
    run.steps(40)
    async with open_app(run, size=size) as (app, pilot, _):
        for key in PAGE_NAMES:
            await pilot.press(key)
            await settle(app, pilot)
            terminal = _cells(app)
            for step in range(4):
                run.steps(1)
                run.node()
                if step == 1:
                    app.notify("over the panels")
                app.tick()
                updates.clear()
                await pilot.pause()
                await pilot.pause()
                for update in updates:
                    for y, x, strip in update.pieces:
                        terminal[y][x : x + strip.cell_length] = _cells_of(list(strip))
                if step != 1:  # a toast that comes is laid out, and the whole screen sent
                    assert terminal == _cells(app), (key, step)
                terminal = _cells(app)


def _cells(app: ZerotopApp) -> list[list[tuple[str, object]]]:
    """Each cell of the screen: what stands in it, and how."""
    return [_cells_of(list(strip)) for strip in app.screen._compositor.render_strips()]


def _cells_of(segments: list[Segment]) -> list[tuple[str, object]]:
    return [(character, segment.style) for segment in segments for character in segment.text]


async def test_a_panel_behind_another_one_is_not_asked_for_lines(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, run):
        await settle(app, pilot)
        asked: list[Widget] = []
        lines = Widget.render_lines

        def asking(self: Widget, crop: Region) -> list[Strip]:
            asked.append(self)
            return lines(self, crop)

        events, table = app.screen.query_one("#events"), app.screen.query_one("#ranks")
        monkeypatch.setattr(Widget, "render_lines", asking)
        run.beat(0, "backward", 2)
        app.tick()
        await pilot.pause()
        assert table in asked and events not in asked
        assert isinstance(app.screen, LiveScreen)
        app.screen.zoom(events)
        await settle(app, pilot)
        asked.clear()
        run.beat(0, "backward", 3)
        app.tick()
        await pilot.pause()
        assert table not in asked


async def test_what_flickers_waits_but_not_for_a_step(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(lines, "FLICKER_S", 0.5)
    monkeypatch.setattr(lines, "monotonic", lambda: now_s)
    async with open_app(size=(120, 38)) as (app, pilot, run):

        def shown() -> str:
            return "\n".join(screen_text(app))

        now_s += 1.0
        run.beat(0, "checkpoint", 3)
        await settle(app, pilot)
        assert "checkpoint" in shown()
        run.beat(0, "offload", 2)
        await settle(app, pilot)
        assert "2/4 offload" not in shown()
        now_s += 0.5
        run.beat(0, "offload", 2)
        await settle(app, pilot)
        assert "2/4 offload" in shown()
        run.beat(0, "gather", 3)
        await settle(app, pilot)
        assert "3/4 gather" not in shown()
        run.steps(1)
        run.beat(0, "gather", 3)
        await settle(app, pilot)
        assert "3/4 gather" in shown()


async def test_only_a_new_screen_is_given_time_to_settle(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    hold = App.delay_update
    monkeypatch.setattr(App, "delay_update", lambda app, delay=0.05: (held.append(delay), hold(app, delay))[1])
    async with open_app(size=(120, 38)) as (app, pilot, _):
        for key in "2121":
            await pilot.press(key)
            await settle(app, pilot)
        assert held == [0.05, HOLD_S, HOLD_S, HOLD_S]


async def test_a_screen_that_was_away_has_the_styles_of_the_theme_that_was_chosen_meanwhile(open_app: OpenApp) -> None:
    async with open_app(size=(120, 38)) as (app, pilot, _):
        await pilot.press("2", "1")
        await settle(app, pilot)
        header = app.screen.query_one("#header")
        before = header.background_colors
        await pilot.press("2")
        app.theme = "light"
        await settle(app, pilot)
        await pilot.press("1")
        await settle(app, pilot)
        assert app.screen.query_one("#header") is header
        assert all(now != then for now, then in zip(header.background_colors, before, strict=True))
