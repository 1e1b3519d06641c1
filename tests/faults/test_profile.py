"""Profiles and timelines of real ranks under the real supervisor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.wire.messages import Command, Event
from runtime.wire.profile import DONE
from runtime.wire.rundir import read_run
from tests.faults.test_real_run import CONFIG
from tests.harness.runs import StartedRun
from tests.harness.trace_check import Trace
from tests.harness.waiting import until
from zerotop.cli import main
from zerotop.source.live import LiveSource

pytestmark = pytest.mark.timeout(240)
LONG = {**CONFIG, "zerotop": {**CONFIG["zerotop"], "train": {"steps": 100_000}}}  # type: ignore[dict-item]
START_DEADLINE_S, MERGE_DEADLINE_S, STOP_DEADLINE_S = 60.0, 60.0, 90.0
"""What merges and what writes checkpoints has idle priority."""


def files_of(source: LiveSource, identity: str) -> list[Event]:
    events = [one for one in source.state.events if isinstance(one, Event) and one.what == DONE]
    return [one for one in events if one.data["id"] == identity]


def test_two_ranks_are_profiled_while_the_run_goes_on(
    launch_real: Callable[..., StartedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch_real(LONG, name="profiled")
    run.see_step(3, deadline_s=START_DEADLINE_S)
    record = run.command("profile", "p1", steps=2)
    assert record.ack.state == "applied", record.ack.reason
    step = record.ack.step
    assert step is not None
    assert record.ack.result == {"steps": [step + 1, step + 2], "ranks": [0, 1]}
    run.see(lambda source: files_of(source, "p1"), "the merged file", deadline_s=MERGE_DEADLINE_S)
    (event,) = files_of(run.source, "p1")
    assert (event.severity, event.data["problem"]) == ("info", "")
    assert event.text.startswith(f"profile of steps {step + 1} to {step + 2}, ranks 0, 1: {event.data['path']} (")
    run.see_step(step + 4)  # the run goes on
    trace = Trace(run.path / event.data["path"])
    for rank in range(2):
        _check_rank(trace, f"rank {rank}", step)
    assert sorted(path.name for path in (run.path / "profiles").iterdir()) == [Path(event.data["path"]).name]

    assert run.command("pause").ack.state == "applied"
    refused = run.command("profile", "p2")
    assert refused.ack.reason == "the run is paused and takes no steps: resume it, and profile then"
    assert run.command("resume").ack.state == "applied"
    assert run.command("profile", "p3", steps=100, ranks=[1]).ack.state == "applied"
    second = run.command("profile", "p4", steps=1, ranks=[0])
    assert (second.ack.state, second.ack.reason) == ("rejected", "a profile is being taken already")
    run.source.send(Command(id="s1", name="stop"))
    run.see_end("stopped", deadline_s=STOP_DEADLINE_S)
    left = list((run.path / "profiles").glob("profile-*.json.gz"))
    assert len(left) == 2, "what was profiled before the stop is kept"
    assert not list((run.path / "profiles").glob("*/rank-*"))


def _check_rank(trace: Trace, rank: str, step: int) -> None:
    """The steps, phases and collectives of telemetry and the operations of torch are there, and on one clock: the
    engine's own ranges begin in the phases in which telemetry says that they do."""
    steps = trace.track(rank, "steps")
    assert [one[2]["name"] for one in steps] == [f"step {step + 1}", f"step {step + 2}"]
    phases = trace.track(rank, "phases")
    assert [one[2]["name"] for one in phases].count("forward") == 4  # two micro-steps each
    assert {one[2]["name"] for one in trace.track(rank, "collectives")} >= {
        "reduce_scatter",
        "all_gather",
        "all_reduce",
    }
    pid = next(number for number, name in trace.processes.items() if name.startswith(rank))
    ranges = [
        one
        for key, slices in trace.slices.items()
        if key[0] == pid
        for one in slices
        if one[2]["name"].startswith("zero2.reduce_scatter")
    ]
    assert ranges
    backward = [one for one in phases if one[2]["name"] in ("backward", "reduce")]
    inside = [any(begin - 50 <= one[0] <= end + 50 for begin, end, _ in backward) for one in ranges]
    assert all(inside), f"{inside.count(False)} of {len(inside)} ranges are out of their phase"


def _live_trace() -> Trace | None:
    """What has been recorded of the run so far; None until it holds collectives of both ranks."""
    if main(["trace", "crashed", "live.json.gz"]):
        return None
    trace = Trace(Path("live.json.gz"))
    return trace if all(trace.track(f"rank {rank}", "collectives") for rank in range(2)) else None


def test_the_timeline_after_the_supervisor_was_killed(
    launch_real: Callable[..., StartedRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGKILL: nobody closes the recording."""
    run = launch_real(LONG, name="crashed")
    run.see_step(3, deadline_s=START_DEADLINE_S)
    monkeypatch.chdir(tmp_path)
    # While it is being recorded: what the hub has received is written once a second.
    live = until(_live_trace, "a time line of both ranks")
    os.kill(read_run(run.path).supervisor_pid, signal.SIGKILL)
    until(run.all_gone, "the end of every process")
    assert main(["trace", "crashed", "after.json.gz"]) == 0
    after = Trace(tmp_path / "after.json.gz")
    for rank in ("rank 0", "rank 1"):
        before = [one[2]["name"] for one in live.track(rank, "steps")]
        assert [one[2]["name"] for one in after.track(rank, "steps")][: len(before) - 1] == before[:-1]
        assert len(after.track(rank, "collectives")) >= len(live.track(rank, "collectives"))
