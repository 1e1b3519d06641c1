"""What a run does when it ends, breaks, is told to stop, or is killed: nothing survives, and the directory is
honest."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import CheckpointSaved
from runtime.wire.rundir import LIVE_TOPIC, read_run, read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import until
from zerotop.hub.recorder import read_messages
from zerotop.rundir.directory import find_run, list_runs, read_entry
from zerotop.rundir.paths import RunError, lock_sockets, make_sockets_folder, runs_home
from zerotop.source.opening import open_source
from zerotop.state.events import record_text
from zerotop.state.run import RunState

Start = Callable[..., StartedRun]
NEVER_RESTARTED = {"overrides": ["zerotop.restarts.limit=0"]}


# ---- a good run ------------------------------------------------------------------------------------------------------
def test_a_finished_run_leaves_its_state_and_no_process(start: Start) -> None:
    run = start(FAKE_STEPS=30)
    run.see_state("finished")
    until(run.all_gone, "every process gone")
    status = read_status(run.path)
    assert (status.state, status.step, status.exit_code, status.error) == ("finished", 30, 0, "")
    assert status.ended_wall_s and status.started_wall_s and status.ended_wall_s > status.started_wall_s
    assert list_runs()[0].name == run.path.name


def test_only_its_user_can_reach_a_run(start: Start) -> None:
    run = start()
    run.see_step(1)
    folder = run.entry.sockets.folder
    assert len(folder.name) == 8 and folder.parent == Path(f"/tmp/zerotop-{os.getuid()}")
    for place in (run.path, folder, folder.parent, run.path / "logs" / "1"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700, place
    for place in [*folder.iterdir(), *run.path.rglob("*")]:
        assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0, place
    listening = [
        connection
        for process in run.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == []


def test_a_terminal_that_goes_away_touches_nothing(start: Start) -> None:
    run = start()
    run.see_step(1)
    supervisor = psutil.Process(read_run(run.path).supervisor_pid)
    assert supervisor.terminal() is None
    assert os.getsid(supervisor.pid) not in (os.getsid(0), supervisor.pid)
    assert supervisor.ppid() != os.getpid()
    for number in (signal.SIGHUP, signal.SIGINT):
        supervisor.send_signal(number)
    before = run.source.state.step
    run.see_step(before + 5)
    assert run.source.state.state_name == "running"


def test_a_late_screen_is_told_everything(start: Start) -> None:
    run = start()
    run.see_step(10)
    assert run.command("checkpoint").ack.state == "applied"
    assert run.command("pause").ack.state == "applied"
    late = run.screen()
    run.see(lambda source: source.connection == "live" and len(source.state.ranks) == 2, "the snapshot", late)
    run.see(lambda source: late.poll() is not None and source.state.hub_seq == late.state.hub_seq, "both at one point")

    def known(state: RunState) -> dict[str, object]:
        ranks = [rank for _, rank in sorted(state.ranks.items())]
        return {
            "status": state.status,
            "hello": [rank.hello for rank in ranks],
            "steps": [rank.step for rank in ranks],
            "ledgers": [rank.memory and rank.memory.ledger for rank in ranks],
            "phases": [rank.phase for rank in ranks],
            "series": list(state.series),
            "commands": state.commands,
            "events": list(state.events),
        }

    assert known(late.state) == known(run.source.state)
    assert len(late.state.series) >= 10 and late.state.state_name == "paused"


# ---- commands --------------------------------------------------------------------------------------------------------
def test_commands_are_applied_at_a_step_and_recorded(start: Start) -> None:
    run = start()
    run.see_step(1)
    paused = run.command("pause")
    assert paused.ack.step and paused.command.number == 1
    run.see_state("paused")
    assert run.command("pause").ack.reason == "the run is paused already"
    changed = run.command("set", log_interval="1", lr_factor=0.5)
    assert changed.ack.step == paused.ack.step
    assert changed.ack.result == {"log_interval": 1, "lr_factor": 0.5}  # in the ranks' own types
    saved = run.command("checkpoint")
    assert saved.ack.result == {"path": f"checkpoints/step-{paused.ack.step}", "step": paused.ack.step}
    run.see(lambda source: source.state.status.last_checkpoint_step == paused.ack.step, "the checkpoint in the status")
    refused = run.command("set", telemetry_hz=1000)
    assert refused.ack.state == "rejected" and "0.5 to 50" in refused.ack.reason and refused.command.number == 0
    assert run.command("resume").ack.state == "applied"
    run.see_step(paused.ack.step + 3)
    assert run.command("resume").ack.reason == "the run is not paused (running)"
    stopped = run.command("stop")
    assert stopped.ack.state == "applied"
    run.see_state("stopped")
    until(run.all_gone, "every process gone")

    late = open_source(read_entry(run.path))
    assert [(r.command.name, r.ack.state) for r in late.state.commands.values()] == [
        (r.command.name, r.ack.state) for r in run.source.state.commands.values()
    ]
    assert {record.command.who for record in late.state.commands.values()} == {"tester"}
    assert late.state.ranks[0].step == run.source.state.ranks[0].step
    assert late.state.ranks[1].step == run.source.state.ranks[1].step
    late.close()


def test_the_same_id_twice_acts_once(start: Start) -> None:
    run = start()
    run.see_step(1)
    first = run.command("checkpoint", identity="once")
    run.see_step(first.ack.step + 3)
    other = run.screen()
    run.see(lambda source: "once" in source.state.commands, "the record", other)
    other.send(first.command.model_copy(update={"number": 0}))
    run.see_step(first.ack.step + 6)
    assert other.state.commands["once"].ack == run.source.state.commands["once"].ack == first.ack
    saved = [event for event in run.source.state.events if isinstance(event, CheckpointSaved)]
    assert len(saved) == 1


def test_a_command_given_before_the_ranks_are_there_reaches_them(start: Start) -> None:
    run = start(FAKE_LATE_S=0.7)
    answer = run.command("pause")
    assert answer.ack.state == "applied" and answer.ack.step is not None and answer.ack.step < 10
    run.see_state("paused")


def test_commands_open_at_the_end_are_answered(start: Start) -> None:
    run = start(FAKE_HANG="0:5")
    run.see_step(4)
    _send(run, "checkpoint")
    assert run.command("abort").ack.state == "applied"
    run.see_state("aborted")
    answers = {record.command.name: record.ack for record in run.source.state.commands.values()}
    assert (answers["abort"].state, answers["abort"].step) == ("applied", 4)
    assert answers["checkpoint"].reason == "the run ended before it could be applied"


def _send(run: StartedRun, name: str) -> None:
    from runtime.wire.messages import Command

    run.source.send(Command.model_validate({"id": name, "name": name}))
    run.see(lambda source: name in source.state.commands, f"{name} accepted")


# ---- ends ------------------------------------------------------------------------------------------------------------
def test_abort_ends_every_process_even_those_that_ignore_it(start: Start) -> None:
    run = start(FAKE_IGNORE_TERM=1, FAKE_CHILD=1)
    run.see_step(2)
    assert len(run.processes()) == 6
    assert run.command("abort").ack.state == "applied"
    run.see_state("aborted")
    until(run.all_gone, "every process gone")
    assert read_status(run.path).reason == "aborted by tester"


def test_a_killed_rank_is_named(start: Start) -> None:
    run = start(NEVER_RESTARTED, FAKE_CHILD=1)
    run.see_step(3)
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    run.see_state("failed")
    until(run.all_gone, "every process gone")
    status = read_status(run.path)
    assert (status.failed_rank, status.exit_code) == (1, -9)
    # Where the kernel's counters can be read: nobody ran out of memory here.
    nobody = "rank 1 was killed by SIGKILL (not by the kernel's OOM killer)"
    assert status.reason in (
        nobody,
        "rank 1 was killed by SIGKILL (perhaps by the kernel's OOM killer: its records can't be read here)",
    )
    assert status.step >= 3


def test_the_last_error_of_the_failing_rank_is_shown(start: Start) -> None:
    run = start(NEVER_RESTARTED, FAKE_CRASH="1:7")
    run.see_state("failed")
    until(run.all_gone, "every process gone")
    status = read_status(run.path)
    assert status.failed_rank == 1
    assert status.error.endswith("RuntimeError: rank 1 breaks at step 7 as it was told")
    assert status.reason == "rank 1 failed after step 6: RuntimeError: rank 1 breaks at step 7 as it was told"


def test_a_killed_launcher_takes_its_ranks_along(start: Start) -> None:
    run = start(NEVER_RESTARTED, FAKE_CHILD=1)
    run.see_step(2)
    launcher = psutil.Process(run.pid_of_rank(0)).parent()
    assert launcher is not None and launcher.pid != read_run(run.path).supervisor_pid
    launcher.kill()
    run.see_state("failed")
    until(run.all_gone, "every process gone")
    assert read_status(run.path).reason == "torchrun was killed by SIGKILL"


def _has_steps(run: Path) -> bool:
    return any(getattr(message, "kind", "") == "step" for message in read_messages(run))


def test_a_killed_supervisor_leaves_no_rank_and_no_lie(start: Start) -> None:
    run = start()
    run.see_step(3)
    supervisor = psutil.Process(read_run(run.path).supervisor_pid)
    until(lambda: read_status(run.path).step >= 3, "the step in state.json")
    until(lambda: _has_steps(run.path), "a step in the recording, which is written once a second")
    supervisor.kill()
    until(run.all_gone, "every process gone")
    assert read_status(run.path).state == "running"  # what it said last
    entry = find_run(run.path.name)
    assert entry.status.state == "failed" and not entry.live
    assert entry.status.reason.startswith("the supervisor died (killed?); last known step ")
    assert int(entry.status.reason.split()[-1]) >= 3
    with pytest.raises(RunError, match="is over"):
        find_run(run.path.name, live_only=True)
    assert _has_steps(run.path)
    make_sockets_folder().rmdir()
    assert not run.entry.sockets.folder.exists()  # swept with the next launch


def test_sockets_of_a_killed_supervisor_stay_until_its_launcher_has_ended(start: Start) -> None:
    run = start(FAKE_HANG="0:3", ZEROTOP_ORPHAN_GRACE_S="3")
    launcher = psutil.Process(run.pid_of_rank(0)).parent()
    assert launcher is not None
    psutil.Process(read_run(run.path).supervisor_pid).kill()
    make_sockets_folder().rmdir()
    assert launcher.is_running() and run.entry.sockets.folder.exists()
    until(run.all_gone, "every process gone")


def test_sigterm_stops_the_run(start: Start) -> None:
    run = start()
    run.see_step(2)
    os.kill(read_run(run.path).supervisor_pid, signal.SIGTERM)
    run.see_state("stopped")
    until(run.all_gone, "every process gone")


def test_a_program_with_many_open_files_starts_a_run(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    with ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))  # the descriptors of the run come after the 1,024 that select() takes
        run = start(FAKE_STEPS=3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        run.see_state("finished")
    until(run.all_gone, "every process gone")


def test_sigusr1_aborts_a_run_that_does_not_stop(start: Start) -> None:
    run = start(FAKE_HANG="0:3", ZEROTOP_STOP_DEADLINE_S="0.5")
    run.see(lambda source: (beat := source.state.rank(0).heartbeat) and beat.step == 3, "rank 0 in the step that hangs")
    run.see(lambda source: source.state.rank(1).step and source.state.rank(1).step.step > 6, "rank 0 was left behind")
    os.kill(read_run(run.path).supervisor_pid, signal.SIGUSR1)
    run.see_state("aborted")
    until(run.all_gone, "every process gone")
    assert read_status(run.path).reason.startswith("the run did not stop within 0.5 s of SIGUSR1: ")


def test_a_removed_run_directory_is_made_again_and_the_run_stops(start: Start) -> None:
    run = start({"name": "q1"})
    run.see_step(2)
    shutil.rmtree(run.path, ignore_errors=True)
    until((run.path / "run.json").exists, "its directory again")
    run.see_state("stopped")
    until(run.all_gone, "every process gone")
    events = [event.text for event in run.source.state.events if getattr(event, "what", "") == "run directory"]
    assert len(events) == 1 and events[0].startswith(f"the run directory {run.path} was removed")
    assert [(entry.name, entry.status.state) for entry in list_runs()] == [("q1", "stopped")]
    assert (run.path / "config.json").exists() and stat.S_IMODE(run.path.stat().st_mode) == 0o700


# ---- starting --------------------------------------------------------------------------------------------------------
def test_what_can_not_start_leaves_nothing(start: Start) -> None:
    with pytest.raises(RunError, match="can't start the ranks: /no/such/program"):
        start({"command": ["/no/such/program"], "name": "never"})
    until(lambda: not (runs_home() / "never").exists(), "its directory is gone")


def test_a_name_is_taken_once(start: Start) -> None:
    start({"name": "q1"})
    with pytest.raises(RunError, match=r"run q1 exists \((starting|running)\): zerotop attach q1"):
        start({"name": "q1"})
    with pytest.raises(RunError, match="nothing to resume"):
        start({"name": "q1", "resume": True})


def test_resume_is_a_new_attempt_with_the_same_data(start: Start) -> None:
    first = start({"name": "q1"}, FAKE_STEPS=30)
    saved = first.command("checkpoint").ack.step
    assert saved is not None
    first.see_state("finished")
    until(first.all_gone, "the first attempt gone")
    with pytest.raises(RunError, match="choose another --name"):
        start({"name": "q1"})
    with pytest.raises(RunError, match=r"seed \(zerotop.train.seed\): was 0, is 3"):
        start({"name": "q1", "resume": True, "overrides": ["zerotop.train.seed=3"]})
    assert read_status(first.path).state == "finished"
    second = start(
        {"name": "q1", "resume": True, "overrides": ["gradient_clipping=0.5"], "config_path": None},
        FAKE_START=saved,
        FAKE_STEPS=saved + 4,
    )
    second.see_state("finished")
    status = read_status(second.path)
    assert (status.attempt, status.step) == (2, saved + 4)
    texts = [record_text(event) for event in second.source.state.events]
    assert "gradient_clipping: 1.0 -> 0.5" in texts
    assert [point.step for point in second.source.state.series] == list(range(1, saved + 5))  # both attempts
    assert json.loads((second.path / "config.json").read_text())["gradient_clipping"] == 0.5
    assert {path.name for path in (second.path / "logs").iterdir()} == {"1", "2"}


def test_a_second_hub_can_not_steal_the_sockets(start: Start) -> None:
    run = start()
    with pytest.raises(RunError, match="in use by another supervisor"):
        lock_sockets(run.entry.sockets.folder)


def test_foreign_frames_do_not_hurt_the_hub(start: Start) -> None:
    import zmq

    run = start()
    run.see_step(2)
    context = zmq.Context()
    speakers = []
    try:
        for name, kind in (("telemetry", zmq.PUB), ("ranks", zmq.DEALER), ("commands", zmq.DEALER)):
            speaker = context.socket(kind)
            speakers.append(speaker)
            speaker.linger = 1000
            speaker.connect(run.entry.sockets.endpoint(name))
            if kind == zmq.PUB:
                until(lambda speaker=speaker: not speaker.send(b"rubbish") and _complained(run), "a complaint")
            for frame in (b"", b"\xff\xfe", b"[1]", b'{"kind":"command","id":"x1","name":"dance"}', b'{"protocol":99}'):
                speaker.send(frame)
            if name == "commands":
                run.see(lambda source: "x1" in source.state.commands, "an answer to a command of an unknown name")
                answer = run.source.state.commands["x1"].ack
                assert answer.state == "rejected" and "'dance'" in answer.reason
    finally:
        for speaker in speakers:
            speaker.close()
        context.term()
    before = run.source.state.step
    run.see_step(before + 3)
    assert any("protocol 99" in record_text(event) for event in run.source.state.events)


def _complained(run: StartedRun) -> bool:
    run.source.poll()
    return any("not JSON" in record_text(event) for event in run.source.state.events)


def test_a_screen_that_stops_reading_slows_nobody(start: Start) -> None:
    run = start(FAKE_STEP_S=0.002)
    run.see_step(1)
    stuck = socket.socket(socket.AF_UNIX)
    stuck.connect(str(run.entry.sockets.path("screens")))  # never even speaks
    import zmq

    context = zmq.Context()
    lazy = context.socket(zmq.SUB)
    lazy.rcvhwm = 1
    lazy.subscribe(LIVE_TOPIC)
    lazy.connect(run.entry.sockets.endpoint("screens"))
    try:
        before = run.source.state.step
        run.see_step(before + 200)
        assert run.command("checkpoint").ack.state == "applied"
        assert run.source.state.ranks[0].packets_lost == 0
    finally:
        stuck.close()
        lazy.close(linger=0)
        context.term()
