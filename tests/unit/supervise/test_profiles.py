"""The parts of profiles, from the ranks' events to the event that names the merged file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.wire.messages import Event
from runtime.wire.profile import DONE, PART
from zerotop.supervise import profiles as module
from zerotop.supervise.profiles import ProfileCollector


class Hub:
    """Keeps events."""

    def __init__(self) -> None:
        self.status = SimpleNamespace(attempt=1, state="running")
        self.events: list[tuple[str, str, str, dict[str, Any]]] = []

    def event(self, what: str, text: str, severity: str = "info", **data: Any) -> None:
        self.events.append((what, text, severity, data))


def part(rank: int, path: str | None = None, problem: str = "", **data: Any) -> Event:
    fields = {"id": "c1", "number": 3, "ranks": [0, 2], "steps": [5, 6], "problem": problem}
    fields |= {"path": f"profiles/3/rank-{rank}.json" if path is None else path, **data}
    return Event(rank=rank, what=PART, text="x", data=fields, wall_s=0)


Merges = list[dict[int, str]]


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Merges:
    """The parts of every merge; each succeeds."""
    found: Merges = []

    def merge(run: Path, number: int, parts: dict[int, str]) -> dict[str, Any]:
        found.append(parts)
        return {"path": "profiles/profile-3-steps-5-6.json.gz", "bytes": 2048, "steps": [5, 6]}

    monkeypatch.setattr(module, "_run_merge", merge)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    return found


def collect(act: Callable[[ProfileCollector, Hub], None], until_events: int = 1) -> Hub:
    """Let a collector run until it has sent so many events. `act` gives it something to do."""
    hub = Hub()

    async def run() -> None:
        collector = ProfileCollector(Path("/run"), hub)  # type: ignore[arg-type]
        task = asyncio.create_task(collector.watch())
        act(collector, hub)
        async with asyncio.timeout(20):
            while len(hub.events) < until_events:
                await asyncio.sleep(0.01)
            await collector.finish()
        task.cancel()

    asyncio.run(run())
    return hub


def test_the_parts_of_all_ranks_are_merged_once(merges: Merges) -> None:
    def act(collector: ProfileCollector, hub: Hub) -> None:
        for rank in (0, 2, 2):
            collector.hear(part(rank))
        collector.hear(Event(rank=0, what="note", text="x", wall_s=0))
        collector.hear(part(7))  # a rank that was not asked

    hub = collect(act)
    assert merges == [{0: "profiles/3/rank-0.json", 2: "profiles/3/rank-2.json"}]
    path = "profiles/profile-3-steps-5-6.json.gz"
    text = f"profile of steps 5 to 6, ranks 0, 2: {path} (2.00 KiB); open it at ui.perfetto.dev"
    assert hub.events == [(DONE, text, "info", {"id": "c1", "path": path, "problem": ""})]


def test_a_rank_without_a_trace_is_named(merges: Merges) -> None:
    def act(collector: ProfileCollector, hub: Hub) -> None:
        collector.hear(part(0))
        collector.hear(part(2, path="", problem="the trace can't be written: No space left on device"))

    hub = collect(act)
    assert merges == [{0: "profiles/3/rank-0.json"}]
    assert hub.events[0][2] == "warning"
    assert hub.events[0][3]["problem"] == "rank 2: the trace can't be written: No space left on device"


def test_after_a_restart_what_is_there_is_merged(merges: Merges) -> None:
    def act(collector: ProfileCollector, hub: Hub) -> None:
        collector.hear(part(0))
        hub.status.attempt = 2

    hub = collect(act)
    assert merges == [{0: "profiles/3/rank-0.json"}]
    assert hub.events[0][3]["problem"] == "rank 2 handed in no part"


def test_no_trace_at_all(merges: Merges) -> None:
    def act(collector: ProfileCollector, hub: Hub) -> None:
        for rank in (0, 2):
            collector.hear(part(rank, path="", problem="torch.profiler can't stop"))

    hub = collect(act)
    assert merges == []
    assert hub.events[0][1].startswith(
        "profile #3 can't be merged: no rank has written a trace; rank 0: torch.profiler"
    )


def test_a_merge_that_dies_is_tried_again(merges: Merges, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed = module._run_merge
    answers = [{}, {}]

    def merge(run: Path, number: int, parts: dict[int, str]) -> dict[str, Any]:
        return answers.pop() if answers else succeed(run, number, parts)

    def act(collector: ProfileCollector, hub: Hub) -> None:
        for rank in (0, 2):
            collector.hear(part(rank))

    monkeypatch.setattr(module, "_run_merge", merge)
    hub = collect(act)
    assert len(merges) == 1
    assert hub.events[0][2] == "info"

    monkeypatch.setattr(module, "_run_merge", lambda run, number, parts: {})
    hub = collect(act)
    text = "profile #3 can't be merged: the process that merges the parts has died; the parts are in profiles/3"
    assert hub.events[0][1] == text


def test_while_the_run_stops_nothing_is_started(merges: Merges) -> None:
    hub = Hub()
    hub.status.state = "stopping"

    async def run() -> None:
        collector = ProfileCollector(Path("/run"), hub)  # type: ignore[arg-type]
        for rank in (0, 2):
            collector.hear(part(rank))
        assert not any(collector._is_ready(job) for job in collector._jobs.values())
        task = asyncio.create_task(collector.watch())
        await collector.finish()
        task.cancel()

    asyncio.run(run())
    assert len(merges) == 1
    assert len(hub.events) == 1


@pytest.mark.parametrize("data", [{"number": "x"}, {"ranks": None}, {"ranks": ["a"]}])
def test_events_that_are_no_parts(data: dict[str, Any]) -> None:
    collector = ProfileCollector(Path("/run"), Hub())  # type: ignore[arg-type]
    collector.hear(part(0, **data))
    assert not collector._jobs
