"""The screen's tests: an app on a scripted run, and a wait for what it should show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from scripted_run import ScriptedRun
from textual.pilot import Pilot

from zerotop.tui.app import Outcome, ZerotopApp

OpenApp = Callable[..., AbstractAsyncContextManager[tuple[ZerotopApp, Pilot[Outcome], ScriptedRun]]]


@pytest.fixture(autouse=True)
def no_user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own themes and keys must not reach a test; returns the folder where a test may put some."""
    folder = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.delenv("ZEROTOP_THEME", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    (folder / "zerotop" / "themes").mkdir(parents=True)
    return folder / "zerotop"


@pytest.fixture
def open_app() -> OpenApp:
    @asynccontextmanager
    async def open_(
        run: ScriptedRun | None = None, size: tuple[int, int] = (120, 40), read_only: bool = False
    ) -> AsyncIterator[tuple[ZerotopApp, Pilot[Outcome], ScriptedRun]]:
        if run is None:
            run = ScriptedRun()
            run.steps(20)
        app = ZerotopApp(run, read_only=read_only)
        async with app.run_test(size=size) as pilot:
            await settle(app, pilot)
            yield app, pilot, run

    return open_


async def settle(app: ZerotopApp, pilot: Pilot[Outcome]) -> None:
    """One tick, and everything that it sets in motion (a panel that grows makes another one shrink)."""
    await pilot.pause()
    app.tick()
    await pilot.pause()
    await pilot.pause()


def screen_text(app: ZerotopApp) -> list[str]:
    """What stands on the terminal, line by line."""
    width, height = app.size
    lines = app.screen._compositor.render_strips() if app.screen.is_current else []
    texts = ["".join(segment.text for segment in strip) for strip in lines[:height]]
    assert all(len(text) <= width * 2 for text in texts)
    return texts
