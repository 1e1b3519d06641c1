"""launch without a screen: progress lines, Ctrl-C, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.wire.rundir import read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import until
from zerotop import cli
from zerotop.commands import progress
from zerotop.commands.progress import follow
from zerotop.launch import start as launching
from zerotop.source.command_answers import asker
from zerotop.source.opening import open_source

Start = Callable[..., StartedRun]


def interrupt_when(*conditions: Callable[[], bool]) -> threading.Thread:
    """Press Ctrl-C once for each condition, in order, as soon as it holds and somebody listens for it."""
    usual = signal.getsignal(signal.SIGINT)

    def press() -> None:
        for condition in conditions:
            until(lambda: signal.getsignal(signal.SIGINT) is not usual, "a handler for Ctrl-C")
            until(condition, "the time to press Ctrl-C")
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_lines_per_interval_and_exit_code_0(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start({"overrides": ["zerotop.log.interval=5"]}, FAKE_STEPS=20)
    assert follow(open_source(run.entry), run.entry) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["5/20", "10/20", "15/20", "20/20"]
    assert lines[0].startswith("step 5/20  loss 1.0000  lr 1.00e-3  norm 1.0000")
    assert lines[-1] == f"{run.path.name}: finished at step 20, all ranks finished"


def test_a_resumed_run_prints_its_own_steps_only(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["zerotop.log.interval=1"]
    first = start({"name": "q1", "overrides": overrides}, FAKE_STEPS=40)
    first.see_step(2)
    first.command("checkpoint")
    first.see_state("finished")
    saved = read_status(first.path).last_checkpoint_step
    assert saved is not None
    again = start({"name": "q1", "resume": True, "overrides": overrides}, FAKE_START=saved, FAKE_STEPS=saved + 3)
    assert follow(open_source(again.entry), again.entry) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{saved + more}/{saved + 3}" for more in (1, 2, 3)]


def test_ctrl_c_stops_after_a_checkpoint(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    before = signal.getsignal(signal.SIGINT)
    thread = interrupt_when(lambda: read_status(run.path).step >= 2)
    assert follow(open_source(run.entry), run.entry) == 0
    thread.join()
    captured = capsys.readouterr()
    assert "stopping after a checkpoint; Ctrl-C again aborts at once" in captured.err
    assert f"{run.path.name}: stopped at step" in captured.out
    assert read_status(run.path).state == "stopped"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_aborts(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(FAKE_HANG="0:3")
    thread = interrupt_when(
        lambda: read_status(run.path).state == "running", lambda: read_status(run.path).state == "stopping"
    )
    assert follow(open_source(run.entry), run.entry) == 1
    thread.join()
    assert "aborting" in capsys.readouterr().err
    status = read_status(run.path)
    assert (status.state, status.reason) == ("aborted", f"aborted by {asker()} (Ctrl-C)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_batch_systems_signal_stops_the_run_and_its_end_is_awaited(
    start: Start, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    run = start()
    usual = signal.getsignal(number)

    def send() -> None:
        until(lambda: read_status(run.path).step >= 2, "step 2")
        until(lambda: signal.getsignal(number) is not usual, f"a handler for {number.name}")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    assert follow(open_source(run.entry), run.entry) == 0
    thread.join()
    assert signal.getsignal(number) is usual
    captured = capsys.readouterr()
    assert f"{number.name}: stopping after a checkpoint, or aborting in 1m 00s" in captured.err
    assert captured.out.splitlines()[-1].startswith(f"{run.path.name}: stopped at step ")
    run.see_state("stopped")
    assert [record.command.who for record in run.source.state.commands.values()] == [number.name]


def test_a_stop_that_can_not_happen_ends_in_time_and_says_which_rank_is_in_the_way(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rank that hangs in its data loader; the signal goes to the launch alone."""
    monkeypatch.setenv("ZEROTOP_STOP_DEADLINE_S", "1")
    run = start(FAKE_HANG="1:3", FAKE_MEET=tmp_path)
    usual = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        until(lambda: read_status(run.path).step >= 2, "step 2")
        until(lambda: signal.getsignal(signal.SIGTERM) is not usual, "a handler for SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    assert follow(open_source(run.entry), run.entry) == 1
    thread.join()
    assert "SIGTERM: stopping after a checkpoint, or aborting in 1 s" in capsys.readouterr().err
    status = read_status(run.path)
    assert status.state == "aborted"
    assert status.reason.startswith("the run did not stop within 1 s of SIGTERM: rank 1 (in backward 2/2, pid ")
    assert "rank 0 waits for it; stacks: logs/1/stacks-1.txt" in status.reason
    assert "File " in (run.path / "logs/1/stacks-1.txt").read_text()


def test_a_supervisor_that_does_not_answer_does_not_hold_the_launch(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROTOP_STOP_DEADLINE_S", "0.5")
    monkeypatch.setattr(progress, "OVERDUE_S", 0.5)
    run = start()
    run.see_step(2)
    supervisor = next(process for process in run.processes() if "zerotop.supervise" in process.cmdline())
    usual = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        until(lambda: signal.getsignal(signal.SIGTERM) is not usual, "a handler for SIGTERM")
        supervisor.suspend()
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        assert follow(open_source(run.entry), run.entry) == 1
        thread.join()
        assert "the supervisor still does not answer 0.5 s after the deadline" in capsys.readouterr().err
    finally:
        supervisor.resume()
    run.command("abort")  # the stop may have reached it, or not
    run.see(lambda source: source.state.state_name in ("stopped", "aborted"), "its end")


def test_a_restart_is_told_and_its_steps_are_printed_again(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["zerotop.log.interval=1"]
    run = start({"overrides": overrides}, FAKE_STEPS=120, FAKE_STEP_S=0.05, FAKE_EVERY=20)
    victim = run.pid_of_rank(1)

    def kill() -> None:
        # Fake ranks do not wait for each other: rank 0, which makes the checkpoints, may be behind.
        until(lambda: read_status(run.path).step >= 25, "step 25")
        until(lambda: (read_status(run.path).last_checkpoint_step or 0) >= 20, "the checkpoint of step 20")
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert follow(open_source(run.entry), run.entry) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("attempt 1 failed: rank 1 was killed by SIGKILL") for line in lines)
    told = next(index for index, line in enumerate(lines) if line.startswith("restart 1 of 3: rank 1 was killed"))
    steps = [int(line.split()[1].split("/")[0]) for line in lines[told:] if line.startswith("step ")]
    start_step = int(lines[told].split("continues from step ")[1].split(",")[0])
    assert steps == list(range(start_step + 1, 121)) and start_step >= 20 and start_step % 20 == 0


def test_a_failure_shows_the_last_error_once_and_exits_1(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start({"overrides": ["zerotop.restarts.limit=0"]}, FAKE_CRASH="1:4")
    assert follow(open_source(run.entry), run.entry, as_json=True) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["state"], document["failed_rank"]) == ("failed", 1)
    assert captured.err.count("last lines of rank 1:") == 1
    assert "RuntimeError: rank 1 breaks at step 4 as it was told" in captured.err


def test_a_killed_supervisor_ends_the_lines_with_the_truth(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    supervisor = next(process for process in run.processes() if "zerotop.supervise" in process.cmdline())

    def kill() -> None:
        until(lambda: read_status(run.path).step >= 2, "step 2")
        supervisor.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert follow(open_source(run.entry), run.entry) == 1
    thread.join()
    assert "the supervisor died (killed?); last known step" in capsys.readouterr().err


# ---- the command -----------------------------------------------------------------------------------------------------
def test_launch_detach_json(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[StartedRun] = []

    def fake_start(config_path: str, **options: object) -> object:
        started.append(start({"config_path": config_path, **options}, FAKE_STEPS=5))
        return started[0].entry

    monkeypatch.setattr(launching, "start_run", fake_start)
    config = str(tmp_path / "config.json")
    assert cli.main(["launch", config, "--nproc", "2", "--device", "cpu", "--name", "q7", "--detach", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["name"] == "q7" and document["state"] in ("starting", "running")
    assert "q7: 2 ranks on the CPU" in captured.err and "zerotop.train.steps: 200, the default" in captured.err
    started[0].see_state("finished")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch"], "launch needs a config file"),
        (["launch", "no-such.json"], "no-such.json"),
        (["launch", "config.json", "--name", "No Good"], "a-z 0-9"),
        (["launch", "config.json", "--"], "after -- comes a script"),
        (["launch", "config.json", "--device", "cpu", "--", "no-such.py", "--set", "x"], "there is no such script"),
    ],
)
def test_a_bad_call_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not (tmp_path / "state").exists()
