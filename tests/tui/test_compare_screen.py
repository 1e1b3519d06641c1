"""Two runs on one screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import BranchPoint, write_json
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, create, insert, write
from tests.harness.waiting import until_async
from tests.tui.screen_reading import screen_text
from zerotop.rundir.directory import RunEntry, read_entry
from zerotop.tui.compare import CompareApp, smoothed


def record(home: Path, name: str, seed: int, **changes: object) -> tuple[RunEntry, SpokenRun]:
    path = write_run(home, name, home, RunStatus(name=name, state="running", attempt=1), **changes)
    write_json(path / "resolved.json", {"optimizer": {"lr": seed}})
    run = SpokenRun(seed=seed, name=name)
    for _ in range(60):
        run.second()
    write(path, run)
    return read_entry(path), run


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 50)])
async def test_both_curves_the_verdict_and_the_branch(tmp_path: Path, size: tuple[int, int]) -> None:
    a, _ = record(tmp_path, "a", 0)
    b, _ = record(tmp_path, "b", 1, branch_of=BranchPoint(run="a", step=30, path=str(a.path)))
    app = CompareApp(a, b)
    async with app.run_test(size=size) as pilot:
        await until_async(lambda: "│ the branch" in screen_text(app)[3])
        text = screen_text(app)
        assert "b beside a: " in text[0] and "≈ loss" in text[0] and "≈ speed" in text[0]
        assert "a  running" in text[1] and "branch of a at step 30" in text[2]
        assert "loss by step, smoothed   │ the branch" in text[3]
        plot = text[4 : app.screen.query_one("#compare-text").region.y]
        assert sum("⡂" in line for line in plot) >= len(plot) // 2 and "60" in plot[-1]
        styles = {
            segment.style.color.name
            for strip in app.screen._compositor.render_strips()[4 : 4 + len(plot)]
            for segment in strip
            if segment.style is not None and segment.style.color is not None and segment.text.strip()
        }
        assert len(styles) >= 3  # two curves and the axes
        await pilot.press("x")
        await until_async(lambda: "loss by time" in screen_text(app)[3])
        await pilot.press("x", "s", "g")
        await until_async(lambda: "gradient norm by tokens " in screen_text(app)[3])
        await pilot.press("q")
    assert app.return_code == 0


async def test_a_run_that_goes_on_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = record(tmp_path, "a", 0)
    b, run = record(tmp_path, "b", 1)
    app = CompareApp(a, b)
    async with app.run_test(size=(120, 40)):
        await until_async(lambda: app.comparison is not None)
        for _ in range(10):
            run.second()
        database = create(b.path / "recording.sqlite")
        insert(database, run.take())
        database.close()
        app.read()
        await until_async(lambda: app.comparison is not None and app.comparison.b.points[-1].step == 70)


async def test_a_recording_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    a, _ = record(tmp_path, "a", 0)
    path = write_run(tmp_path, "b", tmp_path, RunStatus(name="b", state="starting"))
    app = CompareApp(a, read_entry(path))
    async with app.run_test(size=(80, 24)):
        await until_async(lambda: "b has no recording" in "".join(screen_text(app)))


def test_smoothing_keeps_a_common_beginning_together() -> None:
    points = [(float(x), 1.0 / x) for x in range(1, 100)]
    assert smoothed(points)[0] == (1.0, 1.0) and len(smoothed(points)) == 99
    assert smoothed(points[:50])[:50] != [] and smoothed([]) == []
