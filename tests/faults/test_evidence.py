"""Evidence of real hangs: the outlier is named, and so is what its stack, its process and the Flight Recorders say."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runtime.wire.judgement import Verdict
from runtime.wire.messages import Event
from tests.faults.test_hang import CONFIG, HANG_S, events
from tests.harness.runs import StartedRun
from tests.harness.waiting import patient, until
from zerotop import cli
from zerotop.diagnose.pyspy import find_pyspy

pytestmark = pytest.mark.timeout(240)
needs_pyspy = pytest.mark.skipif(find_pyspy() is None, reason="py-spy is not installed (it is in the dev extra)")

SCRIPT = """
import itertools, os, sys, time, torch
import torch.distributed as dist
import runtime as deepspeed

net = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters())
rank, mode = int(os.environ["RANK"]), sys.argv[1]

def read_batch():
    time.sleep(3600)

def own_collective():
    dist.all_reduce(torch.ones(4))

def another_collective():
    dist.broadcast(torch.ones(4), src=0)

def spin():
    any(itertools.repeat(False))

for step in range(100_000):
    loss = engine(torch.randn(4, 8)).square().mean()
    if step == 6:
        if mode == "asleep" and rank == 1:
            read_batch()
        elif mode == "missing":
            own_collective() if rank == 0 else read_batch()
        elif mode == "order":
            own_collective() if rank == 0 else another_collective()
        elif mode == "gil" and rank == 1:
            spin()
        elif mode == "crash" and rank == 1:
            raise ValueError("the script's own mistake")
    engine.backward(loss)
    engine.step()
"""


@pytest.fixture
def hang(
    launch_real: Callable[..., StartedRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], tuple[StartedRun, Event, str]]:
    """`hang(mode)`: the run, the event of its hang, and the text of the report that the event names, with C frames."""
    monkeypatch.setenv("ZEROTOP_HANG_S", str(HANG_S))
    script = tmp_path / "hangs.py"
    script.write_text(SCRIPT)

    def begin(mode: str) -> tuple[StartedRun, Event, str]:
        run = launch_real(CONFIG, name=mode, script=[str(script), mode])
        run.see(lambda _: events(run, "hang"), "the hang", deadline_s=90)
        event = events(run, "hang")[0]
        return run, event, whole_text(run, event)

    return begin


def whole_text(run: StartedRun, event: Event) -> str:
    """The report, once py-spy has read the C frames, if it is there: they come after the event."""
    path = run.path / event.data["stacks"]
    if find_pyspy():
        until(lambda: "py-spy" in path.read_text(), "C frames, or why there are none", patient(40))
    return path.read_text()


def line_of(text: str) -> int:
    return SCRIPT.split("\n").index(text) + 1


def test_a_rank_that_sleeps_outside_any_collective_is_the_outlier(
    hang: Callable[[str], tuple[StartedRun, Event, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, event, text = hang("asleep")
    call = "time_sleep" if find_pyspy() else "read_batch"
    place = f"rank 1: {call} at hangs.py:{line_of('    time.sleep(3600)')}"
    assert place in text.splitlines()[2] and "rank 0: " in text.splitlines()[2], text
    # The collective that is open is zerotop's own, in shared memory: torch's recorder says that none of its own is.
    assert "no collective of torch.distributed is open" in text and "carries out in shared memory" in text
    assert event.data["evidence"] == "logs/1/evidence-1"
    assert "; Flight Recorder: " not in event.text

    assert cli.main(["stacks", run.path.name, "--rank", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["result"]
    assert place in answer["text"] and "rank 0: " not in answer["text"].splitlines()[2]
    assert cli.main(["stacks", run.path.name, "--rank", "2"]) == 1
    assert "there is no rank 2: the ranks are 0 to 1" in capsys.readouterr().err


def test_the_flight_recorder_names_the_rank_that_is_missing(
    hang: Callable[[str], tuple[StartedRun, Event, str]],
) -> None:
    run, event, text = hang("missing")
    line = line_of("    dist.all_reduce(torch.ones(4))")
    assert "Flight Recorder: rank 1 has not enqueued all_reduce " in event.text
    assert f" of the default group; rank 0 waits in it, at hangs.py:{line}" in event.text
    folder = run.path / event.data["evidence"]
    assert {path.name for path in folder.iterdir()} == {"flight-rank-0.json", "flight-rank-1.json"}
    assert f"saved beside this: {event.data['evidence']}/" in text
    verdict = the_verdict(run, "hang")
    assert verdict.ranks == [1]
    assert "; Flight Recorder: rank 1 has not enqueued all_reduce " in verdict.text


def the_verdict(run: StartedRun, what: str) -> Verdict:
    """The hub's verdict, once it is of this kind."""
    run.see(lambda source: source.state.verdict is not None and source.state.verdict.what == what, what)
    assert run.source.state.verdict is not None
    return run.source.state.verdict


def test_another_collective_under_the_same_number_is_named(
    hang: Callable[[str], tuple[StartedRun, Event, str]],
) -> None:
    run, event, text = hang("order")
    finding = text[text.index("different collectives under number ") :].partition("\n")[0]
    assert " of the default group: rank 0: all_reduce of [4] Float (all_reduce at hangs.py:" in finding
    assert "; rank 1: broadcast of [4] Float (broadcast at hangs.py:" in finding
    assert f"Flight Recorder: {finding}" in event.text
    verdict = the_verdict(run, "desync")
    assert verdict.ranks == [0, 1] and verdict.text.endswith(f"; Flight Recorder: {finding}")


@needs_pyspy
def test_a_rank_that_spins_with_the_gil_held_is_read_with_its_c_frames(
    hang: Callable[[str], tuple[StartedRun, Event, str]],
) -> None:
    _, _, text = hang("gil")
    line = line_of("    any(itertools.repeat(False))")
    assert f"rank 1: builtin_any at hangs.py:{line}" in text or f"rank 1: spin at hangs.py:{line}" in text, text
    assert "holds the GIL" in next(x for x in text.splitlines() if x.startswith("rank 1: pid"))
    assert "rank 1, training thread (with C frames, read by py-spy):" in text
    assert "rank 1: no Flight Recorder: it did not answer: its training thread holds the GIL" in text


def test_a_stopped_rank_is_told_by_the_kernel_and_read_without_its_help(
    launch_real: Callable[..., StartedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROTOP_HANG_S", str(HANG_S))
    run = partial(launch_real, CONFIG)(name="stopped")
    run.see(lambda source: source.state.step >= 3, "step 3", deadline_s=90)
    os.kill(run.pid_of_rank(1), signal.SIGSTOP)
    run.see(lambda _: events(run, "hang"), "the hang")
    text = whole_text(run, events(run, "hang")[0])
    assert f"rank 1, process {run.pid_of_rank(1)} as the kernel sees it:\n  State: T (stopped)\n" in text
    assert "rank 1: no Flight Recorder: stopped by a signal" in text
    if find_pyspy():
        assert "rank 1, training thread (innermost call first, read by py-spy):" in text
        assert "rank 1: stopped by a signal: " in text.splitlines()[2]
    os.kill(run.pid_of_rank(1), signal.SIGCONT)


def test_a_rank_that_fails_leaves_its_flight_recorder(launch_real: Callable[..., StartedRun], tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(SCRIPT)
    run = launch_real(CONFIG, name="crash", script=[str(script), "crash"], overrides=["zerotop.restarts.limit=0"])
    run.see(lambda _: events(run, "exit"), "the end", deadline_s=90)
    run.see_end("failed", deadline_s=90)
    document = json.loads((run.path / "logs" / "1" / "flight-rank-1.json").read_text())
    assert document["groups"]["0"]["ranks"] == [0, 1] and document["recorders"]["other"]["entries"]
