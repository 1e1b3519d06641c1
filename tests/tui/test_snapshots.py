"""Every screen, at three sizes and in every theme, as it was when it was last looked at: a recorded real run.

The files in snapshots/ are meant to be read. After a change that is meant, look at the screens, then write them anew:
ZEROTOP_SNAPSHOTS=write python -m pytest tests/tui/test_snapshots.py
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from rich.style import Style

from tests.harness.recorded_run import RecordedRun
from tests.tui.screen_reading import screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES

FOLDER = Path(__file__).parent / "snapshots"
RECORDING = "quickstart-2-ranks"
SIZES = ((80, 24), (120, 38), (200, 50))
STEP = 64


@pytest.fixture(autouse=True)
def greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times of day do not depend on where the test runs."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def colours(app: ZerotopApp) -> str:
    """A digest of the style of every cell, however the cells are cut into segments."""
    digest = hashlib.sha256()
    for strip in app.screen._compositor.render_strips():
        for style, segments in groupby(strip, key=lambda segment: _looks(segment.style or Style())):
            digest.update(f"{sum(len(segment.text) for segment in segments)}{style}".encode())
    return digest.hexdigest()[:12]


def _looks(style: Style) -> str:
    return f"{style.color}{style.bgcolor}{style.bold}{style.underline}"


async def at_rest(app: ZerotopApp, pilot: object) -> list[str]:
    """The text of the screen once it does not change any more: a scroll bar that comes makes lines wrap anew, and these
    make it shorter."""
    lines: list[str] = []
    looks = ""
    for _ in range(10):
        for _ in range(3):
            await settle(app, pilot)  # type: ignore[arg-type]
        before, lines, looks = (lines, looks), [line.rstrip() for line in screen_text(app)], colours(app)
        if (lines, looks) == before:
            break
    return lines


async def taken(app: ZerotopApp, pilot: object) -> str:
    """The text of the screen, and digests of its colours: at the middle size in every theme, at the others in a dark
    and a light one."""
    lines = await at_rest(app, pilot)
    found = []
    for theme in app.palettes if app.size.width == 120 else ("dark", "light"):
        app.theme = theme
        await settle(app, pilot)  # type: ignore[arg-type]
        found.append(f"{theme} {colours(app)}")
    app.theme = "dark"
    await settle(app, pilot)  # type: ignore[arg-type]
    return "\n".join([*lines, "=" * 20, *found, ""])


def differences(path: Path, now: str) -> list[str]:
    """What is new against the file; or writes it, if that was asked for."""
    if os.environ.get("ZEROTOP_SNAPSHOTS") == "write":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(now)
    elif not path.exists() or path.read_text() != now:
        before = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in now.splitlines() if line not in before]
        return [f"{path.name}:\n" + "\n".join(lines[:12])]
    return []


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("state", ["live", "ended"])
async def test_every_screen_is_as_it_was_looked_at(size: tuple[int, int], state: str) -> None:
    run = RecordedRun(RECORDING, STEP if state == "live" else None)
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    different: list[str] = []
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        for key, name in PAGE_NAMES.items() if state == "live" else [("1", "Summary")]:
            await pilot.press(key)
            await settle(app, pilot)
            path = FOLDER / f"{name.lower()}-{size[0]}x{size[1]}.txt"
            different += differences(path, await taken(app, pilot))
    assert not different, "\n\n".join(different)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_the_grid_is_as_it_was_looked_at(size: tuple[int, int]) -> None:
    run = ScriptedRun(ranks=512 if size[0] == 200 else 64, nodes=64 if size[0] == 200 else 8, gpu=True)
    run.gpu_changes = {13: {"temperature_c": 84.0}, 42: {"temperature_c": 79.0}}
    run.steps(8)
    run.node()
    app = ZerotopApp(run)
    app.clock = lambda: run.wall_s
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        await pilot.press("g", "g", "down", "right")
        await settle(app, pilot)
        different = differences(FOLDER / f"grid-{size[0]}x{size[1]}.txt", await taken(app, pilot))
    assert not different, different
