"""A state directory of its own for each test, and in it a live run with a hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import write_json
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(home: Path) -> Iterator[FakeHub]:
    """The hub of the live run q1."""
    folder = Path(tempfile.mkdtemp(prefix="zt-", dir="/tmp"))
    hub = FakeHub(folder)
    run = write_run(home, "q1", folder, RunStatus(name="q1", state="running", attempt=1))
    write_json(run / "resolved.json", {"zerotop": {"train": {"steps": 200}}})
    yield hub
    hub.close()
    shutil.rmtree(folder)
