"""A rank's profiler: one at a time, over the steps that were asked for, and nothing that fails in it reaches the
training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engine import profile as module
from runtime.engine.profile import StepProfiler
from runtime.telemetry import NullTelemetry
from runtime.wire.messages import Command
from runtime.wire.profile import PART, part_path
from zerotop.trace.parts import clock_of, events_of


class Link(NullTelemetry):
    """Keeps events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def event(self, what: str, text: str, **fields: Any) -> None:
        self.events.append({"what": what, "text": text, **fields})


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def profiler(tmp_path: Path, link: Link) -> StepProfiler:
    return StepProfiler(1, torch.device("cpu"), link, tmp_path)


def command(steps: int = 2, ranks: list[int] | None = None) -> Command:
    return Command(id="c1", name="profile", arguments={"steps": steps, "ranks": ranks or [0, 1]}, number=5)


def work() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def test_it_ends_after_the_last_step(profiler: StepProfiler, link: Link, tmp_path: Path) -> None:
    assert profiler.begin(command(), step=10) == ""
    for step in (11, 12):
        assert profiler.active
        work()
        profiler.at_boundary(step)
    assert not profiler.active
    profiler.end(12, wait=True)
    (event,) = link.events
    assert (event["what"], event["text"]) == (PART, "profiled steps 11 to 12")
    path = part_path(tmp_path, 5, 1)
    assert event["data"] == {
        "id": "c1", "number": 5, "ranks": [0, 1], "steps": [11, 12], "path": "profiles/5/rank-1.json", "problem": "",
    }  # fmt: skip
    assert sum(one.get("name") == "aten::mm" for one in events_of(path)) == 2
    clock = clock_of(path)
    assert clock is not None and clock.marks == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_other_ranks_do_nothing(profiler: StepProfiler, link: Link) -> None:
    assert profiler.begin(command(ranks=[0, 2]), step=10) == ""
    assert not profiler.active
    profiler.end(10, wait=True)
    assert link.events == []


def test_one_at_a_time(profiler: StepProfiler, link: Link) -> None:
    profiler.begin(command(), step=10)
    assert profiler.refusal() == "a profile is being taken already"
    profiler.end(10, "ended early: the run was paused", wait=True)
    assert profiler.refusal() == ""
    assert link.events[0]["data"]["problem"] == "ended early: the run was paused"
    assert (
        StepProfiler(0, torch.device("cpu"), link, None).refusal() == "this engine has no run directory to write into"
    )


def test_beside_a_profiler_of_the_script(profiler: StepProfiler) -> None:
    with torch.profiler.profile():
        assert profiler.begin(command(), step=10) == "rank 1: another profiler is running, perhaps the script's own"
    assert not profiler.active


class Broken:
    """A profiler of which one method fails."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            if name == self._method:
                raise RuntimeError("CUPTI is not there\nand more")

        return call


@pytest.mark.parametrize(
    ("method", "said"),
    [("stop", "torch.profiler can't stop"), ("export_chrome_trace", "the trace can't be written")],
)
def test_failures_are_reported(
    method: str, said: str, profiler: StepProfiler, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_make_profiler", lambda device: Broken(method))
    assert profiler.begin(command(steps=1), step=10) == ""
    profiler.at_boundary(11)
    profiler.end(11, wait=True)
    (event,) = link.events
    assert event["data"]["problem"] == f"{said}: CUPTI is not there"
    assert (event["data"]["path"], event["severity"]) == ("", "warning")
    assert profiler.refusal() == ""


def test_a_profiler_that_does_not_start(profiler: StepProfiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_make_profiler", lambda device: Broken("start"))
    assert profiler.begin(command(), step=10) == "rank 1: torch.profiler can't start: CUPTI is not there"
    assert not profiler.active


def test_a_full_disk(profiler: StepProfiler, link: Link, tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("in the way")
    profiler.begin(command(steps=1), step=10)
    profiler.at_boundary(11)
    profiler.end(11, wait=True)
    assert link.events[0]["data"]["problem"].startswith("the trace can't be written: ")


def test_it_ends_early_when_it_takes_too_much_memory(
    profiler: StepProfiler, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler.begin(command(steps=100), step=10)
    profiler.at_boundary(11)
    assert profiler.active
    monkeypatch.setattr(module, "GROWN_BYTES", -(2**40))
    profiler.at_boundary(12)
    profiler.end(12, wait=True)
    assert json.dumps(link.events[0]["data"]["steps"]) == "[11, 12]"
    assert "GiB of host memory" in link.events[0]["data"]["problem"]
