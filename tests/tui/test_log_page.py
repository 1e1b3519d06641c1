"""The page of logs: what the scroll bar does to its lines, and the log file in a pager."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.waiting import until_async
from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.output import SERVED_VARIABLE
from zerotop.rundir.logs import find_log
from zerotop.tui.app import ZerotopApp
from zerotop.tui.pager import PagerError, pager_command
from zerotop.tui.panels.events import PREFIX
from zerotop.tui.panels.log import LogPanel
from zerotop.tui.screens.rank import RankScreen


@pytest.mark.parametrize("size", [(80, 24), (120, 38)])
async def test_no_line_loses_its_end_when_the_scroll_bar_comes(open_app: OpenApp, size: tuple[int, int]) -> None:
    run = ScriptedRun()
    async with open_app(run, size=size) as (app, pilot, _):
        await pilot.press("6")
        await settle(app, pilot)
        log = app.screen.query_one(LogPanel)
        text = "".join(f"{number:03}" for number in range(99))  # folded at the last column, not at a blank
        for _ in range(size[1]):
            if log.show_vertical_scrollbar:
                break
            run.log(text, "warning")
            await settle(app, pilot)
            place = log.scrollable_content_region
            lines = [line[place.x : place.right] for line in screen_text(app)[place.y : place.bottom]]
            assert text in "".join(line[PREFIX:].rstrip() for line in lines)
        assert log.show_vertical_scrollbar


async def test_a_scroll_bar_that_comes_late_says_where_its_lines_are(open_app: OpenApp) -> None:
    run = ScriptedRun()
    async with open_app(run, size=(80, 24)) as (app, pilot, _):
        await pilot.press("6")
        for number in range(40):
            run.log(f"line {number}", "warning")
        await settle(app, pilot)
        log = app.screen.query_one(LogPanel)
        assert log.show_vertical_scrollbar and log.scroll_y == log.max_scroll_y > 0
        log.show_vertical_scrollbar = False
        log.vertical_scrollbar.position = 0  # a bar that is not shown hears nothing of scrolling
        log.show_vertical_scrollbar = True
        await settle(app, pilot)
        assert log.vertical_scrollbar.position == log.scroll_y == log.max_scroll_y


# ---- the file in a pager ---------------------------------------------------------------------------------------------
@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A run directory with two attempts' logs of two ranks."""
    run = tmp_path / "a run; touch /tmp/oops"
    for attempt in (1, 2):
        folder = run / "logs" / str(attempt)
        folder.mkdir(parents=True)
        for rank in (0, 1):
            (folder / f"rank-{rank}.log").write_text(f"attempt {attempt}, rank {rank}\n")
    return run


@pytest.fixture
def pager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pager that writes what it was given into this file, and ends."""
    program, given = tmp_path / "pager.py", tmp_path / "given.json"
    program.write_text(
        f"import json, pathlib, sys\npathlib.Path({str(given)!r}).write_text(json.dumps(sys.argv[1:]))\n"
    )
    monkeypatch.setenv("PAGER", f"{sys.executable} {program} --chop '$(touch oops)'")
    return given


def steps_aside(app: ZerotopApp, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A terminal that can be handed over, which the one of the tests can't; returns what becomes of it."""
    seen: list[str] = []

    @contextmanager
    def suspend() -> Iterator[None]:
        seen.append("left")
        yield
        seen.append("back")

    monkeypatch.setattr(app, "suspend", suspend)
    return seen


def toasts(app: ZerotopApp) -> str:
    return "\n".join(toast.message for toast in app._notifications)


async def test_e_opens_the_log_of_the_rank_and_the_run_is_followed_meanwhile(
    open_app: OpenApp, logs: Path, pager: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app(read_only=True) as (app, pilot, run):
        run.run_path = logs
        seen = steps_aside(app, monkeypatch)
        await pilot.press("e")
        assert not seen, "the overview has no log"
        for keys, wanted in (
            (("6",), "rank-0.log"),
            (("i", "i"), "rank-1.log"),
            (("1", "down", "enter"), "rank-1.log"),
        ):
            await pilot.press(*keys)
            await settle(app, pilot)
            pager.unlink(missing_ok=True)
            seen.clear()
            await pilot.press("e")
            await until_async(lambda: seen == ["left", "back"] and not app.paging)
            words = json.loads(pager.read_text())
            assert words == ["--chop", "$(touch oops)", str(logs / "logs" / "1" / wanted)], "the attempt that is shown"
        assert isinstance(app.screen, RankScreen) and not toasts(app)
        run.steps(1)
        await settle(app, pilot)
        assert "step 21 of 200" in "\n".join(screen_text(app))


async def test_keys_wait_for_no_pager_and_nothing_is_drawn_under_it(
    open_app: OpenApp, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, program = tmp_path / "stop", tmp_path / "waits.py"
    program.write_text(f"import pathlib, time\nwhile not pathlib.Path({str(stop)!r}).exists(): time.sleep(0.02)\n")
    monkeypatch.setenv("PAGER", f"{sys.executable} {program}")
    async with open_app() as (app, pilot, run):
        run.run_path = logs
        seen = steps_aside(app, monkeypatch)
        await pilot.press("6", "e")
        await until_async(lambda: app.paging)
        run.steps(1)
        await pilot.press("q", "C", "1")
        app.tick()
        assert app.is_running and run.sent == [] and app.page is not None and app.page.KEY == "6"
        stop.touch()
        await until_async(lambda: seen == ["left", "back"] and not app.paging)
        await pilot.press("1")
        await settle(app, pilot)
        assert app.page is not None and app.page.KEY == "1" and "step 21 of" in "\n".join(screen_text(app))


async def test_where_no_pager_can_be_opened_it_says_how_to_see_the_log(
    open_app: OpenApp, logs: Path, pager: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app() as (app, pilot, run):

        async def told() -> str:
            app.clear_notifications()
            await pilot.press("e")
            await until_async(lambda: toasts(app))
            return toasts(app)

        await pilot.press("6", "i", "i")
        assert "no log of rank 1 on this machine" in await told()
        run.run_path = logs
        assert "can't be handed to a pager; `zerotop logs q1 --rank 1`" in await told()
        app.host = "me@box"
        assert "the log is on me@box; `zerotop logs me@box:q1 --rank 1` shows it" in await told()
        app.host = None
        run.run_path = logs / "gone"
        assert "there is no log of rank 1 in" in await told()
        run.run_path = logs
        monkeypatch.setenv("PAGER", "no-such-pager -x")
        assert "there is no command 'no-such-pager'" in await told()
        monkeypatch.setenv("PAGER", "less '")
        assert "No closing quotation" in await told()
        monkeypatch.setenv(SERVED_VARIABLE, "1")
        assert "a browser has no terminal" in await told()
        assert not pager.exists()


def test_the_pager_is_opened_at_the_end_and_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("less", "more", "vim", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    log = Path("/r/logs/1/rank-0.log")
    for pager, words in (
        ("less -R", ["less", "-R", "-f", "+G", str(log)]),
        ("mine 'a b'; rm -rf /", ["mine", "a b;", "rm", "-rf", "/", str(log)]),
        ("vim -R", ["vim", "-R", "+", str(log)]),
        ("", ["less", "-f", "+G", str(log)]),
        ("cat", ["less", "-f", "+G", str(log)]),
    ):
        assert pager_command(log, {"PAGER": pager}) == words
    (tmp_path / "less").unlink()
    assert pager_command(log, {}) == ["more", str(log)]
    (tmp_path / "more").unlink()
    with pytest.raises(PagerError, match=r"set \$PAGER"):
        pager_command(log, {})


def test_the_log_of_the_attempt_else_of_the_newest_is_found(logs: Path) -> None:
    folder = logs / "logs"
    assert find_log(logs, 1) == folder / "2" / "rank-1.log" == find_log(logs, 1, 7)
    assert find_log(logs, 1, 1) == folder / "1" / "rank-1.log"
    assert find_log(logs, 5) is None and find_log(logs / "no", 0) is None
    (folder / "2" / "rank-0.log").write_text("")
    (folder / "2" / "rank-0.log.1").write_text("rolled")
    assert find_log(logs, 0) == folder / "2" / "rank-0.log.1"
    (folder / "2" / "rank-0.log").unlink()
    assert find_log(logs, 0) == folder / "1" / "rank-0.log"
