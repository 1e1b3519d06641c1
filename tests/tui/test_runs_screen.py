"""zerotop alone: the list of runs, and what it says where there are none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, create, insert, write
from tests.harness.waiting import until_async
from tests.tui.screen_reading import screen_text
from zerotop.rundir.notes import add_note
from zerotop.tui.runs import RunsApp, curve_text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def record(home: Path, name: str, state: str, started: float, steps: int = 60) -> tuple[Path, SpokenRun]:
    status = RunStatus(name=name, state=state, attempt=1, step=steps, started_wall_s=started)
    run = SpokenRun(name=name, gpu=True)
    for _ in range(steps):
        run.second()
    return write(write_run(home, name, home, status), run), run


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_the_runs_with_their_curves_the_newest_first(home: Path, size: tuple[int, int]) -> None:
    record(home, "old", "finished", 1000.0)
    path, _ = record(home, "new", "running", 2000.0)
    write_run(home, "empty", home, RunStatus(name="empty", state="failed", reason="no GPU", started_wall_s=500.0))
    add_note(path, "the best so far", "me")
    app = RunsApp()
    async with app.run_test(size=size) as pilot:
        await until_async(lambda: "3 in" in screen_text(app)[0])
        text = screen_text(app)
        rows = [line for line in text if any(name in line for name in ("new ", "old ", "empty "))]
        assert [row.split()[1 if "▌" in row else 0] for row in rows] == ["new", "old", "empty"]
        assert "▶ running" in rows[0] and "60" in rows[0] and "█" in rows[0] and "GiB" in rows[0]
        assert "✔ finished" in rows[1] and "✖ failed" in rows[2]
        if size[0] == 120:
            assert "the best so far" in rows[0] and "no GPU" in rows[2]
        await until_async(lambda: any(key in screen_text(app)[-1] for key in ("⏎ Open", "Enter Open")))
        await pilot.press("down", "down", "up", "enter")
    assert app.return_value == ("open", "old")


async def test_the_replay_of_a_run_and_leaving(home: Path) -> None:
    record(home, "q1", "finished", 1000.0, steps=5)
    app = RunsApp(selected="q1")
    async with app.run_test(size=(80, 24)) as pilot:
        await until_async(lambda: app.lines is not None)
        await pilot.press("r")
    assert app.return_value == ("replay", "q1")
    app = RunsApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("q")
    assert app.return_value is None


async def test_without_runs_it_says_what_to_type_and_starts_a_demo(home: Path) -> None:
    app = RunsApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await until_async(lambda: "There are no runs yet." in "\n".join(screen_text(app)))
        text = "\n".join(screen_text(app))
        assert "zerotop launch config.json" in text
        assert "d  starts a demo run" in text and "d Demo run" in text
        await pilot.press("enter", "d")
    assert app.return_value == ("demo", "")


async def test_without_a_trainer_there_is_no_demo(home: Path) -> None:
    app = RunsApp("training needs torch, not installed here")
    async with app.run_test(size=(80, 24)) as pilot:
        await until_async(lambda: "There are no runs yet." in "\n".join(screen_text(app)))
        text = "\n".join(screen_text(app))
        assert "training needs torch, not installed here" in text and "Demo run" not in text
        await pilot.press("d")
        assert app.is_running
        await pilot.press("q")
    assert app.return_value is None


async def test_a_run_that_goes_on_is_drawn_again(home: Path) -> None:
    path, run = record(home, "q1", "running", 1000.0)
    app = RunsApp()
    async with app.run_test(size=(120, 24)):
        await until_async(lambda: app.lines is not None)
        for _ in range(5):
            run.second()
        database = create(path / "recording.sqlite")
        insert(database, run.take())
        database.close()
        app.read()
        await until_async(lambda: app.lines is not None and app.lines[0].glance.step == 65)
        assert app.lines is not None and len(app.lines[0].glance.losses) <= 48


def test_the_curve_in_a_cell() -> None:
    assert curve_text([]) == "" and curve_text([1.0]) == "▁" and curve_text([2.0, 1.0], 2) == "█▁"
    assert curve_text([math.nan, math.nan]) == "··"
    falling = curve_text([100.0] + [10 - step / 10 for step in range(99)], 20)
    assert falling[0] == "█" and falling[-1] == "▁" and len(set(falling)) > 5  # the first value does not flatten it
    assert "×" in curve_text([1.0, math.nan, 2.0], 3)
