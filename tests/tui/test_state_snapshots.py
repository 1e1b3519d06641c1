"""Dialogs, the other screens, and the states of a run, as they were when they were last looked at: in a dark and a
light theme at 120x38, the overview also at 300x80. test_snapshots.py says how the files are written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.app import App
from textual.widgets import Input

from runtime.wire.messages import Goodbye, RunStatus
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, write
from tests.harness.recorded_run import RecordedRun
from tests.harness.waiting import until_async
from tests.tui.screen_reading import screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from tests.tui.test_snapshots import FOLDER, RECORDING, STEP, at_rest, colours, differences, greenwich
from tests.tui.test_stacks_screen import REPORT, answer
from zerotop.rundir.directory import read_entry
from zerotop.source.replay import ReplaySource
from zerotop.state.run import RunState
from zerotop.tui import runs
from zerotop.tui.app import ZerotopApp
from zerotop.tui.compare import CompareApp
from zerotop.tui.replay import ReplayApp
from zerotop.tui.runs import RunsApp
from zerotop.tui.screens.stacks import StacksScreen

__all__ = ["greenwich"]
SIZE = (120, 38)
NOW_S = 1_790_000_900.0


async def taken(app: App[Any], pilot: Any) -> str:
    """The text of the screen, and digests of its colours in a dark and a light theme."""
    shown = isinstance(app, ZerotopApp)
    lines = await at_rest(app, pilot) if shown else [line.rstrip() for line in screen_text(app)]  # type: ignore[arg-type]
    found = []
    for theme in ("dark", "light", "dark"):
        app.theme = theme
        await (settle(app, pilot) if shown else pilot.pause(0.05))  # type: ignore[arg-type]
        found.append(f"{theme} {colours(app)}")  # type: ignore[arg-type]
    return "\n".join([*lines, "=" * 20, *found[:2], ""])


def path_of(name: str, size: tuple[int, int] = SIZE) -> Path:
    return FOLDER / f"{name}-{size[0]}x{size[1]}.txt"


async def test_the_overview_of_a_large_terminal_is_as_it_was_looked_at() -> None:
    run = RecordedRun(RECORDING, STEP)
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    async with app.run_test(size=(300, 80)) as pilot:
        await settle(app, pilot)
        found = differences(path_of("overview", (300, 80)), await taken(app, pilot))
    assert not found, found


async def test_dialogs_and_the_page_of_a_rank_are_as_they_were_looked_at() -> None:
    run = ScriptedRun(ranks=4, gpu=True)
    run.steps(60)
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    app.desk._now = lambda: 100.0  # an answer takes no time
    found: list[str] = []
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        for name, key in (("rank", "enter"), ("help", "question_mark"), ("confirm", "A"), ("palette", "ctrl+p")):
            await pilot.press(key)
            await settle(app, pilot)
            if name == "palette":
                await until_async(lambda: any("Checkpoint" in line for line in screen_text(app)[3:30]))
                app.screen.query_one(Input).cursor_blink = False
            found += differences(path_of(name), await taken(app, pilot))
            await pilot.press("escape")
            await settle(app, pilot)
        await pilot.press("T")
        await settle(app, pilot)
        answer(run, path="logs/1/stacks-1.txt", text=REPORT)
        assert isinstance(app.screen, StacksScreen)
        app.screen.look()
        found += differences(path_of("stacks"), await taken(app, pilot))
    assert not found, "\n\n".join(found)


async def test_every_state_of_a_run_is_as_it_was_looked_at() -> None:
    run = ScriptedRun(ranks=2)
    run.steps(60)
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    found: list[str] = []
    async with app.run_test(size=SIZE) as pilot:

        async def look(name: str) -> None:
            run._changed = True
            await settle(app, pilot)
            found.extend(differences(path_of(name), await taken(app, pilot)))

        run.age = 7.0
        await look("stale")
        run.age, run.connection = 20.0, "lost: the hub has gone; trying again"
        await look("connection-lost")
        run.age, run.connection = 0.1, "live"
        run.status("paused")
        for rank in range(2):
            run.beat(rank, "paused", 0)
        await look("paused")
        run.say(Goodbye(rank=1, outcome="failed", step=60, error="ValueError: boom", wall_s=run.wall_s))
        run.status("restarting", restarts=1, restart_reason="rank 1: ValueError: boom", reason="restart 1 of 3 in 2 s")
        await look("restarting")
        run.fail(1, 'Traceback (most recent call last):\n  File "train.py", line 7, in step\nValueError: boom')
        await look("failed")
    assert not found, "\n\n".join(found)


async def test_a_run_that_starts_is_as_it_was_looked_at() -> None:
    run = ScriptedRun(ranks=2)
    run.state = RunState()  # no rank has introduced itself
    run.status("starting", attempt=1, name="q1", doing="loading weights: 43%")
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        found = differences(path_of("starting"), await taken(app, pilot))
    assert not found, found


def recorded(home: Path, name: str, state: str, seed: int) -> Path:
    status = RunStatus(name=name, state=state, attempt=1, step=60, started_wall_s=NOW_S - 900 * (1 + seed))  # type: ignore[arg-type]
    path = write_run(home, name, home, status)
    run = SpokenRun(seed=seed, name=name)
    for _ in range(60):
        run.second()
    return write(path, run)


async def test_the_list_of_runs_the_comparison_and_the_replay_are_as_they_were_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    a, b = recorded(tmp_path, "one", "finished", 0), recorded(tmp_path, "two", "finished", 1)
    found: list[str] = []
    compare = CompareApp(read_entry(a), read_entry(b))
    async with compare.run_test(size=SIZE) as pilot:
        await until_async(lambda: "loss" in screen_text(compare)[0])  # type: ignore[arg-type]
        found += differences(path_of("compare"), await taken(compare, pilot))
    source = ReplaySource(a, "one", lambda: 100.0)
    source.start()
    replay = ReplayApp(source)
    replay.clock = lambda: source.wall_s
    async with replay.run_test(size=SIZE) as pilot:
        await until_async(lambda: any("frame" in line for line in screen_text(replay)))
        found += differences(path_of("replay"), await taken(replay, pilot))
    source.close()
    app = RunsApp(selected="one")
    async with app.run_test(size=SIZE) as pilot:
        await until_async(lambda: app.lines is not None)
        monkeypatch.setattr(runs, "runs_home", lambda: Path("~/.local/state/zerotop/runs"))
        monkeypatch.setattr(runs.time, "time", lambda: NOW_S)
        app._redraw()
        await pilot.pause(0.05)
        found += differences(path_of("runs"), await taken(app, pilot))
    assert not found, "\n\n".join(found)
