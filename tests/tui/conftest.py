"""The screen's tests: an app on a scripted run, and a wait for what it should show."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from runtime.wire.messages import RunStatus
from tests.harness.fakehub import FakeHub, step_result
from tests.harness.fakerun import write_run
from tests.tui.screen_reading import OpenApp, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import Outcome, ZerotopApp
from zerotop.tui.widgets import lines


@pytest.fixture(autouse=True)
def no_user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own themes and keys must not reach a test; returns the folder where a test may put some."""
    folder = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.delenv("ZEROTOP_THEME", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    (folder / "zerotop" / "themes").mkdir(parents=True)
    return folder / "zerotop"


@pytest.fixture(autouse=True)
def every_change_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flickers is drawn at every tick."""
    monkeypatch.setattr(lines, "FLICKER_S", 0.0)


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub of the live run q1 at step 77."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = Path(tempfile.mkdtemp(prefix="zt-", dir="/tmp"))
    hub = FakeHub(folder)
    hub.messages[0] = status = RunStatus(name="q1", state="running", attempt=1)
    write_run(tmp_path, "q1", folder, status)
    hub.publish(step_result(0, 77), step_result(1, 77))
    yield hub
    hub.close()
    shutil.rmtree(folder)
