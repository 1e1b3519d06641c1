"""The screen's tests: an app on a scripted run, and a wait for what it should show."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from tests.tui.screen_reading import OpenApp, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import Outcome, ZerotopApp


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
