"""Runs that hang: told with the stacks of every rank, ended only when the config says so, cleared when they move."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import Event
from runtime.wire.rundir import read_run, read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import patient, until
from zerotop import cli
from zerotop.diagnose.hang import JUMP_S

Start = Callable[..., StartedRun]
HANG_S = patient(2)
"""Soon, but longer than a busy machine takes for a step."""


@pytest.fixture
def meet(start: Start, tmp_path: Path) -> Callable[..., StartedRun]:
    """`meet(overrides=[...], FAKE_...)`: two fake ranks that wait for each other at every step, and hang early."""

    def begin(overrides: tuple[str, ...] = (), **environment: object) -> StartedRun:
        (tmp_path / "meet").mkdir(exist_ok=True)
        return start({"overrides": list(overrides)}, FAKE_MEET=tmp_path / "meet", ZEROTOP_HANG_S=HANG_S, **environment)

    return begin


def events(run: StartedRun, what: str) -> list[Event]:
    return [event for event in run.source.state.events if isinstance(event, Event) and event.what == what]


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_it(meet: Callable[..., StartedRun]) -> None:
    run = meet()
    run.see_step(3)
    pid = run.pid_of_rank(1)
    os.kill(pid, signal.SIGSTOP)
    run.see(lambda _: bool(events(run, "hang")), "the hang")
    hang = events(run, "hang")[0]
    seq = int(hang.text.partition("all_reduce ")[2].partition(";")[0])
    assert hang.severity == "error" and hang.text == (
        f"rank 1 (stopped by a signal, pid {pid}) has not entered all_reduce {seq}; rank 0 waits for it; "
        "stacks: logs/1/stacks-1.txt"
    )
    run.see(lambda source: source.state.status.reason == f"hang: {hang.text}", "the hang in the status")
    until(lambda: read_status(run.path).reason == f"hang: {hang.text}", "the hang in state.json")
    file = run.path / "logs" / "1" / "stacks-1.txt"
    text = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f"rank 1: pid {pid}, stopped by a signal, step " in text
    assert "in meet\n" in text.partition("rank 0, training thread")[2]

    # A stuck run's command is answered too, and by what the kernel says of the stopped rank.
    asked = run.command("stacks").ack
    assert asked.state == "applied" and asked.result["path"] == "logs/1/stacks-2.txt"
    assert f"rank 1 (stopped by a signal, pid {pid}) has not entered all_reduce {seq}" in asked.result["text"]
    assert run.source.state.state_name == "running" and len(events(run, "hang")) == 1

    os.kill(pid, signal.SIGCONT)
    run.see(lambda _: len(events(run, "hang")) == 2, "the end of the hang")
    assert events(run, "hang")[1].severity == "info" and "progress resumed" in events(run, "hang")[1].text
    run.see(lambda source: source.state.status.reason == "", "no reason any more")
    run.see_step(run.source.state.step + 3)
    assert read_run(run.path).attempt == 1


def test_on_hang_ends_the_attempt_with_the_reason(meet: Callable[..., StartedRun]) -> None:
    run = meet(("zerotop.restarts.on_hang=true", "zerotop.restarts.limit=0"))
    run.see_step(3)
    os.kill(run.pid_of_rank(0), signal.SIGSTOP)
    run.see_state("failed")
    until(run.all_gone, "every process gone")
    status = read_status(run.path)
    assert f"no progress for {HANG_S:.0f} s: rank 0 (stopped by a signal, pid " in status.reason
    assert status.reason.partition("; stacks: ")[2].startswith("logs/1/stacks-1.txt")
    assert (run.path / "logs" / "1" / "stacks-1.txt").exists()


def test_on_hang_restarts_the_ranks_and_the_new_attempt_is_watched_too(meet: Callable[..., StartedRun]) -> None:
    run = meet(("zerotop.restarts.on_hang=true",))
    reached = 2
    for attempt in (1, 2):
        run.see_step(reached + 1, attempt)  # a hang at the same step again would be the end
        os.kill(run.pid_of_rank(1), signal.SIGSTOP)
        run.see(lambda source, n=attempt: source.state.status.attempt == n + 1, f"attempt {attempt + 1}")  # type: ignore[misc]
        assert (run.path / "logs" / str(attempt) / "stacks-1.txt").exists()
        status = run.source.state.status
        assert status is not None and status.restarts == attempt
        run.see(lambda source: source.state.status.lost_steps > 0, "how many steps are taken again")
        reached = run.source.state.status.lost_steps  # all, for there is no checkpoint
        assert f"no progress for {HANG_S:.0f} s: rank 1 (stopped by a signal, pid " in status.restart_reason
        run.see_state("running")
    run.see_step(3)
    assert [event.severity for event in events(run, "hang")] == ["error", "error"]
    assert run.source.state.status is not None and not run.source.state.status.reason.startswith("hang")


def test_a_paused_run_does_not_hang_and_gives_its_stacks(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    # The fake ranks pause each at a step of its own, so these do not meet.
    run = start(ZEROTOP_HANG_S=HANG_S, FAKE_STACKS=1)
    run.see_step(3)
    assert run.command("pause").ack.state == "applied"
    run.see_state("paused")
    heard = run.source.state.hub_now_ns
    run.see(lambda source: source.state.hub_now_ns - heard > 2 * HANG_S * 1e9, "twice the time of a hang")
    assert events(run, "hang") == []
    assert cli.main(["stacks", run.path.name]) == 0
    printed = capsys.readouterr()
    assert "paused at step" in printed.out and "in boundary\n" in printed.out
    assert printed.err == "saved in the run directory: logs/1/stacks-1.txt\n"


def test_a_supervisor_that_was_stopped_itself_reports_no_hang(meet: Callable[..., StartedRun]) -> None:
    run = meet()
    run.see_step(3)
    supervisor = psutil.Process(read_run(run.path).supervisor_pid)
    began = time.monotonic()
    supervisor.suspend()
    until(lambda: time.monotonic() - began > JUMP_S + HANG_S, "more than a hang takes, and than a jump of its clock")
    supervisor.resume()
    run.see_step(run.source.state.step + 20)
    assert events(run, "hang") == []


# ---- real ranks ------------------------------------------------------------------------------------------------------
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {
        "model": {"preset": "gpt-tiny"},
        "data": {"seq_len": 16, "files": ["text.txt"]},
        "train": {"steps": 100_000},
        "checkpoint": {"interval": 0},
    },
}
HANGS = """
import os, torch
import runtime as deepspeed

net = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters())
ends = os.pipe()

def reads_for_ever():
    os.read(ends[0], 1)

for step in range(100_000):
    loss = engine(torch.randn(4, 8)).square().mean()
    if step == 6 and int(os.environ["RANK"]) == 1:
        reads_for_ever()
    engine.backward(loss)
    engine.step()
"""


@pytest.fixture
def launch(launch_real: Callable[..., StartedRun], monkeypatch: pytest.MonkeyPatch) -> Callable[..., StartedRun]:
    """`launch(...)`: start_run() with a small real config on two CPU ranks, in which hangs are seen soon."""
    monkeypatch.setenv("ZEROTOP_HANG_S", str(HANG_S))
    return partial(launch_real, CONFIG)


def see_step(run: StartedRun, step: int) -> None:
    run.see(lambda source: source.state.step >= step, f"step {step}", deadline_s=90)


@pytest.mark.timeout(240)
def test_stacks_of_a_real_run_show_the_training_loop(
    launch: Callable[..., StartedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(name="real")
    see_step(run, 3)
    assert cli.main(["stacks", "real", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["command"], document["state"]) == ("stacks", "applied")
    text = document["result"]["text"]
    assert "/runtime/trainer/train.py" in text and text == (run.path / document["result"]["path"]).read_text()
    assert "rank 1: pid " in text
    step = run.source.state.step
    see_step(run, step + 3)

    os.kill(run.pid_of_rank(1), signal.SIGSTOP)
    run.see(lambda _: bool(events(run, "hang")), "the hang", None)
    assert "rank 1" in events(run, "hang")[0].text and "stopped by a signal" in events(run, "hang")[0].text
    os.kill(run.pid_of_rank(1), signal.SIGCONT)
    see_step(run, run.source.state.step + 3)
    run.see(lambda source: source.state.status.reason == "", "no reason any more")


@pytest.mark.timeout(240)
def test_a_rank_that_hangs_in_native_code_is_found_with_its_line(
    launch: Callable[..., StartedRun], tmp_path: Path
) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    run = launch(name="native", script=[str(script)])
    run.see(lambda _: events(run, "hang"), "the hang", deadline_s=90)
    text = events(run, "hang")[0].text
    assert text.startswith("rank 1 (in ") and "; rank 0 waits for it; " in text
    assert "stacks: logs/1/stacks-1.txt" in text  # the Flight Recorder's own words may stand before it
    stacks = (run.path / "logs" / "1" / "stacks-1.txt").read_text()
    assert "in reads_for_ever\n" in stacks.partition("rank 1, training thread")[2]
