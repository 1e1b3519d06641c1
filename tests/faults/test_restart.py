"""A rank that dies takes its attempt along, and the supervisor starts the next one, unless that makes no sense or the
run's end was asked for."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from runtime.wire.messages import Command, Event, RunStatus
from runtime.wire.rundir import read_run, read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import patient, until
from zerotop.hub.recorder import read_recording
from zerotop.supervise.restarts import AGAIN_THE_SAME

Start = Callable[..., StartedRun]


def kill_rank(run: StartedRun, rank: int = 1, number: int = signal.SIGKILL) -> None:
    os.kill(run.pid_of_rank(rank), number)


def see_attempt(run: StartedRun, attempt: int, step: int = 0) -> None:
    """Both ranks of `attempt` train, and have finished `step`."""
    run.see_step(step, attempt)
    run.see(lambda source: source.state.state_name in ("running", "paused"), f"attempt {attempt} trains")


def texts(run: StartedRun, what: str) -> list[str]:
    return [event.text for event in run.source.state.events if isinstance(event, Event) and event.what == what]


def send(run: StartedRun, name: str, **arguments: object) -> None:
    run.source.send(Command.model_validate({"id": name, "name": name, "arguments": arguments, "who": "tester"}))
    run.see(lambda source: name in source.state.commands, f"{name} accepted")


# ---- the next attempt ------------------------------------------------------------------------------------------------
def test_a_killed_rank_is_followed_by_the_next_attempt(start: Start) -> None:
    run = start(FAKE_EVERY=10, FAKE_CHILD=1)
    run.see_step(12)
    before = run.processes()
    kill_rank(run)
    see_attempt(run, 2)
    assert [process.pid for process in before if process.is_running()] == [read_run(run.path).supervisor_pid]
    status = run.source.state.status
    assert status is not None
    assert (status.attempt, status.restarts, status.failed_rank) == (2, 1, None)
    assert status.restart_reason.startswith("rank 1 was killed by SIGKILL (")
    (told,) = texts(run, "restart")
    found = re.fullmatch(
        r"restart 1 of 3: rank 1 was killed by SIGKILL \([^;]+; continues from step (\d+), "
        r"(?:(\d+) steps? replayed|no step lost)",
        told,
    )
    assert found is not None, told
    saved, lost = int(found[1]), int(found[2] or 0)
    assert saved >= 10 and saved % 10 == 0 and status.lost_steps == lost
    assert status.last_checkpoint_step is not None and status.last_checkpoint_step >= saved
    assert (read_run(run.path).attempt, {path.name for path in (run.path / "logs").iterdir()}) == (2, {"1", "2"})
    assert run.command("checkpoint").ack.state == "applied"
    assert run.command("stop").ack.state == "applied"
    run.see_state("stopped")
    until(run.all_gone, "every process gone")
    steps = [point.step for point in run.source.state.series]
    assert steps == sorted(set(steps)) and steps[-1] >= saved  # the curve has each step once
    rows = list(read_recording(run.path))
    assert {row.attempt for row in rows} == {1, 2} and [r.attempt for r in rows] == sorted(r.attempt for r in rows)
    seen = [row.message.state for row in rows if isinstance(row.message, RunStatus)]
    order = [state for index, state in enumerate(seen) if index == 0 or seen[index - 1] != state]
    assert order == ["starting", "running", "restarting", "starting", "running", "stopping", "stopped"]


def test_a_killed_launcher_is_followed_by_the_next_attempt(start: Start) -> None:
    run = start(FAKE_EVERY=10)
    run.see_step(12)
    os.kill(psutil.Process(run.pid_of_rank(0)).ppid(), signal.SIGKILL)
    see_attempt(run, 2, 11)
    assert run.source.state.status.restart_reason == "torchrun was killed by SIGKILL"


def test_without_a_checkpoint_it_starts_from_step_0(start: Start) -> None:
    run = start()
    run.see_step(3)
    kill_rank(run, 0)
    see_attempt(run, 2, 1)
    assert "starts again from step 0, " in texts(run, "restart")[0]
    until(lambda: read_status(run.path).lost_steps >= 3, "the lost steps in state.json")


def test_survivors_that_do_not_leave_are_not_waited_for(start: Start) -> None:
    run = start(FAKE_IGNORE_TERM=1)
    run.see_step(2)
    began = time.monotonic()
    kill_rank(run)
    see_attempt(run, 2, 1)
    assert time.monotonic() - began < patient(15)  # their launcher would wait for ever


def test_a_screen_that_comes_late_sees_the_new_attempt_only(start: Start) -> None:
    run = start(FAKE_EVERY=10)
    run.see_step(12)
    kill_rank(run)
    see_attempt(run, 2, 11)
    assert run.command("pause").ack.state == "applied"
    late = run.screen()
    run.see(lambda source: len(source.state.ranks) == 2, "the snapshot", late)
    run.see(lambda source: late.poll() is not None and source.state.hub_seq == late.state.hub_seq, "both at one point")
    assert {rank.hello.attempt for rank in late.state.ranks.values() if rank.hello} == {2}
    assert [point.step for point in late.state.series] == [point.step for point in run.source.state.series]


# ---- what the old ranks had been told --------------------------------------------------------------------------------
def test_a_paused_run_is_paused_again_and_settings_stay(start: Start) -> None:
    run = start(FAKE_EVERY=5)
    run.see_step(6)
    assert run.command("set", log_interval=3, telemetry_hz=7.0).ack.state == "applied"
    assert run.command("set", log_interval=2).ack.state == "applied"
    assert run.command("pause").ack.state == "applied"
    run.see_state("paused")
    kill_rank(run)
    see_attempt(run, 2)
    run.see_state("paused")
    asked = [record for record in run.source.state.commands.values() if record.command.who == "the restart"]
    assert [(r.command.name, r.command.arguments, r.ack.state) for r in asked] == [
        ("set", {"log_interval": 2, "telemetry_hz": 7.0}, "applied"),
        ("pause", {}, "applied"),
    ]
    assert run.command("resume").ack.state == "applied"


def test_open_commands_are_answered_or_reach_the_new_ranks(start: Start) -> None:
    run = start(FAKE_HANG="0:5")
    run.see(lambda source: source.state.rank(0).step and source.state.rank(0).step.step == 4, "rank 0 hangs")
    send(run, "pause")
    send(run, "checkpoint")
    kill_rank(run)
    run.see(lambda source: source.state.commands["checkpoint"].ack.state == "applied", "the checkpoint")
    assert run.source.state.commands["pause"].ack.reason == "the ranks restarted"
    until(lambda: read_status(run.path).attempt == 2, "the second attempt in state.json")


# ---- no next attempt -------------------------------------------------------------------------------------------------
def ended(run: StartedRun, state: str = "failed") -> RunStatus:
    run.see_state(state)
    until(run.all_gone, "every process gone")
    return read_status(run.path)


def test_the_limit_is_kept(start: Start) -> None:
    run = start({"overrides": ["zerotop.restarts.limit=1"]}, FAKE_EVERY=10)
    run.see_step(3)
    kill_rank(run)
    see_attempt(run, 2, 12)
    kill_rank(run, 0)
    status = ended(run)
    assert status.reason.startswith("rank 0 was killed by SIGKILL (")
    assert status.reason.endswith("; not restarted: the limit of 1 restart within 1h 00m is reached")
    assert (status.attempt, status.restarts, status.failed_rank) == (2, 1, 0)


def test_a_failure_that_repeats_itself_ends_the_run(start: Start) -> None:
    status = ended(start(FAKE_CRASH="1:7"))
    assert status.reason == (
        "rank 1 failed after step 6: RuntimeError: rank 1 breaks at step 7 as it was told; "
        f"the same failure at the same step twice in a row: {AGAIN_THE_SAME}"
    )
    assert (status.attempt, status.restarts) == (2, 1)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"FAKE_CRASH": "1:3", "FAKE_FATAL": "1"}, AGAIN_THE_SAME),
        ({"FAKE_CRASH": "1:1"}, f"no step was finished before it, so {AGAIN_THE_SAME}"),
    ],
)
def test_what_would_only_repeat_itself_is_not_tried_again(start: Start, environment: dict[str, str], why: str) -> None:
    status = ended(start(**environment))
    assert status.reason.endswith(f"; {why}") and (status.attempt, status.restarts) == (1, 0)


@pytest.mark.parametrize("name", ["stop", "signal"])
def test_a_stop_that_is_open_ends_the_run(start: Start, name: str) -> None:
    run = start(FAKE_HANG="0:5")
    run.see(lambda source: source.state.rank(0).step and source.state.rank(0).step.step == 4, "rank 0 hangs")
    if name == "stop":
        send(run, "stop")
    else:
        os.kill(read_run(run.path).supervisor_pid, signal.SIGTERM)
        run.see_state("stopping")
    os.kill(run.pid_of_rank(0), signal.SIGKILL)
    status = ended(run)
    assert status.reason.endswith("; not restarted, because a stop was requested") and status.attempt == 1


def restarting(start: Start) -> StartedRun:
    """A run whose second attempt has begun and whose ranks are not there yet."""
    run = start(FAKE_LATE_S=1.5, FAKE_EVERY=5)
    run.see_step(6)
    kill_rank(run)
    run.see_state("restarting")
    return run


def test_a_stop_while_it_restarts_stops_it(start: Start) -> None:
    run = restarting(start)
    answer = run.command("stop")
    assert answer.ack.state == "applied"
    status = ended(run, "stopped")
    assert (status.attempt, status.restarts) == (2, 1) and status.step >= answer.ack.step


def test_an_abort_while_it_restarts_ends_it_at_once(start: Start) -> None:
    run = restarting(start)
    assert run.command("abort").ack.state == "applied"
    assert ended(run, "aborted").reason == "aborted by tester"


# ---- signals to ranks ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_every_process_stops_the_run_even_before_they_listen(start: Start, number: signal.Signals) -> None:
    run = start(FAKE_LATE_S=1.0)
    supervisor = read_run(run.path).supervisor_pid
    until(lambda: len(run.processes()) == 4, "two ranks, their launcher and the supervisor")
    for process in run.processes():
        if process.pid != supervisor:
            process.send_signal(number)
    status = ended(run, "stopped")
    assert status.attempt == 1 and 1 <= status.step < 5


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_of_a_paused_run_stops_it(start: Start, number: signal.Signals) -> None:
    run = start(FAKE_EVERY=10)
    run.see_step(2)
    assert run.command("pause").ack.state == "applied"
    process = psutil.Process(run.pid_of_rank(1))
    process.send_signal(number)
    assert ended(run, "stopped").attempt == 1
    assert [text.split(":")[0] for text in texts(run, "signal")] == [number.name]
