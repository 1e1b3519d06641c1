"""What rank 0 tells of its start reaches the run's status, and leaves it when the start is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import RunStatus
from runtime.wire.startnote import begin_start, end_start, tell_start
from zerotop.supervise.startwatch import StartWatch


class Hub:
    def __init__(self) -> None:
        self.status = RunStatus(name="q1", state="starting")
        self.changes = 0

    def set_status(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)
        self.changes += 1


@pytest.fixture(autouse=True)
def rank_0(tmp_path: Path) -> Iterator[None]:
    begin_start(tmp_path)
    yield
    end_start()


def test_the_status_follows_the_start_and_forgets_it(tmp_path: Path) -> None:
    hub = Hub()
    watch = StartWatch(hub, tmp_path)  # type: ignore[arg-type]
    watch.look()
    assert hub.changes == 0
    tell_start("importing torch")
    watch.look()
    watch.look()
    assert (hub.status.doing, hub.changes) == ("importing torch", 1)
    hub.set_status(state="running")
    watch.look()
    assert hub.status.doing == ""


def test_a_new_attempt_does_not_begin_with_what_the_last_one_did(tmp_path: Path) -> None:
    hub = Hub()
    watch = StartWatch(hub, tmp_path)  # type: ignore[arg-type]
    tell_start("building the engine")
    watch.forget()
    hub.set_status(state="restarting")
    watch.look()
    assert hub.status.doing == ""
    watch.forget()  # there is nothing to forget
