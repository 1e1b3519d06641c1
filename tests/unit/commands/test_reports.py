"""status, ls, logs, doctor: documents and text."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import Heartbeat, Memory, RunStatus
from runtime.wire.rundir import write_json
from tests.harness.fakehub import FakeHub, hello, step_result
from tests.harness.fakerun import write_run
from tests.harness.finetuning import evaluation
from tests.harness.waiting import patient, until
from zerotop.cli import main
from zerotop.commands import doctor
from zerotop.hub.recorder import Recorder
from zerotop.rundir.logs import LogTail, cap_logs

ONE_GIB = 2**30


def heartbeat(rank: int) -> Heartbeat:
    return Heartbeat(
        rank=rank,
        phase="backward",
        phase_since_ns=1,
        step=13,
        micro_step=3,
        micro_steps=4,
        entered_seq=5,
        completed_seq=4,
        progress_ns=1,
        now_ns=2,
    )


def memory(rank: int) -> Memory:
    return Memory(
        rank=rank,
        ledger={"parameters": 100, "optimizer": 800},
        rss_bytes=2 * ONE_GIB,
        pinned_bytes=64,
        host_total_bytes=8 * ONE_GIB,
        at_ns=1,
    )


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_of_a_live_run(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        hub.publish(step_result(rank, 12, wait_ms=3.5), heartbeat(rank), memory(rank), source=f"rank/{rank}")
    document = answer(capsys, "status", "q1")
    shown = {name: document[name] for name in ("state", "step", "steps", "loss", "lr", "grad_norm", "tokens_per_s")}
    assert shown == {
        "state": "running",
        "step": 12,
        "steps": 200,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 2000.0,
    }
    assert document["eta_s"] == pytest.approx(188 * 0.1)
    assert (document["stage"], document["precision"], document["attempt"]) == (2, "bf16", 1)
    rank = document["ranks"][1]
    assert (rank["rank"], rank["phase"], rank["micro_step"], rank["micro_steps"]) == (1, "backward", 3, 4)
    assert (rank["host"], rank["pid"], rank["wait_ms"], rank["step"]) == ("box", 101, 3.5, 12)
    assert rank["memory"]["parameters"] == 100
    assert rank["memory"]["optimizer"] == 800
    assert rank["memory"]["other"] == 2 * ONE_GIB - 900
    assert rank["memory"]["rss_bytes"] == 2 * ONE_GIB
    assert rank["memory"]["allocated_bytes"] is None
    assert 0 <= rank["age_s"] < 60
    assert main(["status", "q1"]) == 0
    text = capsys.readouterr().out
    assert "step 12 of 200, ZeRO-2 bf16" in text
    assert "backward 3/4" in text


def test_status_names_the_newest_evaluation_and_the_best(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "status", "q1")["evaluation"] is None
    for number, loss in ((0, 5.0), (50, 2.0), (100, 3.0)):
        hub.publish(evaluation(number, loss, texts=number == 100))
    told = answer(capsys, "status", "q1")["evaluation"]
    assert {name: told[name] for name in ("step", "loss", "best_step", "best_loss", "tokens", "samples")} == {
        "step": 100,
        "loss": 3.0,
        "best_step": 50,
        "best_loss": 2.0,
        "tokens": 14_000,
        "samples": 200,
    }
    assert told["perplexity"] == pytest.approx(20.0855, abs=1e-3)
    assert told["generations"][0]["prompt"] == "What is the capital of France?"
    assert main(["status", "q1"]) == 0
    line = "evaluation at step 100: loss 3.0000, perplexity 20.09; best 2.0000 at step 50"
    assert line in capsys.readouterr().out.splitlines()


def test_status_shows_commands(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.messages.append(RunStatus(name="q1", state="paused", attempt=1))
    assert main(["pause", "q1"]) == 0
    capsys.readouterr()
    assert answer(capsys, "status", "q1")["state"] == "paused"


def test_nan_is_null(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.publish(step_result(0, 1, loss=float("nan"), grad_norm=float("inf")), step_result(1, 1, loss=float("nan")))
    document = answer(capsys, "status", "q1")
    assert document["step"] == 1
    assert document["loss"] is None
    assert document["grad_norm"] is None


def test_status_without_a_hub_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    write_run(home, "q1", Path("/tmp/zt-nowhere"), RunStatus(name="q1", state="starting", attempt=1))
    assert main(["status", "q1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "starting"
    assert "the hub of q1 does not answer" in captured.err
    assert time.monotonic() - started < patient(4)  # there is no socket to wait for


def test_status_of_an_ended_run_comes_from_the_recording(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = RunStatus(
        name="old",
        state="failed",
        step=41,
        reason="rank 1 failed",
        failed_rank=1,
        error="ValueError: boom",
        exit_code=1,
    )
    run = write_run(home, "old", Path("/nowhere"), failed)
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    said = (hello(0), hello(1), step_result(0, 41), step_result(1, 41), heartbeat(0), heartbeat(1))
    for message in (RunStatus(name="old", state="running"), *said):
        recorder.add("rank/0", message)
    recorder.close()
    document = answer(capsys, "status")  # nothing is live: the newest run is meant
    assert (document["name"], document["state"], document["step"], document["loss"]) == ("old", "failed", 41, 2.5)
    assert (document["error"], document["failed_rank"], document["exit_code"]) == ("ValueError: boom", 1, 1)
    assert [(rank["phase"], rank["micro_step"]) for rank in document["ranks"]] == [("ended", None)] * 2
    assert main(["status", "old"]) == 0
    text = capsys.readouterr().out
    assert "error of rank 1:\nValueError: boom" in text
    assert "ended" in text and "backward" not in text


def test_status_of_a_damaged_recording(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(home, "old", Path("/nowhere"), RunStatus(name="old", state="finished"))
    (run / "recording.sqlite").write_bytes(b"no database " * 100)
    assert main(["status", "old"]) == 2
    assert "can't read the recording" in capsys.readouterr().err


def test_ls(hub: FakeHub, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = RunStatus(name="old", state="finished", step=50, reason="all done", started_wall_s=1e9)
    write_run(home, "old", Path("/nowhere"), old)
    listed = answer(capsys, "ls")
    assert [(run["name"], run["state"], run["steps"]) for run in listed] == [
        ("q1", "running", 200),
        ("old", "finished", None),
    ]
    assert listed[1]["started"].startswith("2001-09-0")
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "STEP", "RANKS", "HOST", "STARTED", "WHY"]
    assert lines[1].startswith("q1    running   0/200")
    assert lines[2].endswith("all done")


def test_ls_without_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "ls") == []
    assert main(["ls"]) == 0
    assert "no runs in" in capsys.readouterr().err


@pytest.fixture
def logged(home: Path) -> Path:
    run = write_run(home, "q1", Path("/nowhere"), RunStatus(name="q1", state="running"))
    for attempt in (1, 2):
        folder = run / "logs" / str(attempt)
        folder.mkdir(parents=True)
        for rank in (0, 1, 10):
            (folder / f"rank-{rank}.log").write_text(f"attempt {attempt}\nrank {rank}\nunfinished")
    return run


def test_logs(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "q1", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "attempt 2\nrank 1\n"  # the run is live: an unfinished line waits
    assert main(["logs", "-n", "1"]) == 0
    assert capsys.readouterr().out == "[0] rank 0\n[1] rank 1\n[10] rank 10\n"
    lines = answer(capsys, "logs", "q1", "--attempt", "1", "--rank", "10")
    assert lines == [{"rank": 10, "line": "attempt 1"}, {"rank": 10, "line": "rank 10"}]
    assert main(["logs", "q1", "--rank", "5"]) == 2
    assert "q1 has no rank 5: its ranks are 0, 1, 10" in capsys.readouterr().err
    assert main(["logs", "q1", "--attempt", "9"]) == 2


def test_logs_of_several_ranks_are_merged_by_time(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = logged / "logs" / "2"
    (folder / "rank-10.log").unlink()
    (folder / "rank-0.log").write_text("early\n2026-11-23 10:00:01,100 a\n  more of a\n2026-11-23 10:00:03,000 c\n")
    (folder / "rank-1.log").write_text("2026-11-23 10:00:02,000 b\n2026-11-23 09:00:00,000 set back\n")
    assert main(["logs", "q1"]) == 0
    texts = [line.replace("2026-11-23 ", "") for line in capsys.readouterr().out.splitlines()]
    assert texts == [
        "[0] early",
        "[0] 10:00:01,100 a",
        "[0]   more of a",
        "[1] 10:00:02,000 b",
        "[1] 09:00:00,000 set back",
        "[0] 10:00:03,000 c",
    ]
    assert [entry["rank"] for entry in answer(capsys, "logs", "q1", "-n", "2")] == [0, 1, 1, 0]


def test_logs_go_on_with_what_was_rolled_out_of_a_full_log(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logged / "logs" / "2" / "rank-0.log"
    log.write_text("".join(f"line {number}\n" for number in range(10)))
    assert cap_logs(log.parent, limit_bytes=50) == [log]
    assert main(["logs", "q1", "--rank", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["line 8", "line 9"]
    with log.open("a") as more:
        more.write("line 10\nline 11\n")
    assert main(["logs", "q1", "--rank", "0", "-n", "3"]) == 0
    assert capsys.readouterr().out == "line 9\nline 10\nline 11\n"


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_the_last_lines_are_read_from_the_end(
    logged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("zerotop.rundir.logs.BLOCK_BYTES", 64)
    log = logged / "logs" / "2" / "rank-0.log"
    lines = [f"2026-11-23 10:00:{number:02} {'x' * (number * 7)}" for number in range(60)]
    log.write_text("\n".join(lines) + "\n")
    read = []
    tail = LogTail(log)
    read += tail.last_lines(count, at_end=False)
    assert read[len(read) - min(count, len(read)) :] == lines[60 - min(count, 60) :]
    assert len(read) <= count + 2 + 64 // 20 or count == 200
    assert main(["logs", "q1", "--rank", "0", "-n", str(count)]) == 0
    assert capsys.readouterr().out.splitlines() == lines[60 - min(count, 60) :]


def test_a_log_without_line_ends_is_read_once(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In time that goes with its size, and not with its square."""
    log = logged / "logs" / "2" / "rank-0.log"
    log.write_bytes(b"y" * 40_000_000 + b"\nend\n")
    began = time.process_time()
    assert main(["logs", "q1", "--rank", "0", "-n", "1"]) == 0
    assert capsys.readouterr().out == "end\n"
    assert sum(len(line) for line in LogTail(log).all_lines(at_end=True)) == 40_000_003
    assert time.process_time() - began < 5


def test_logs_follow_until_the_run_ends(logged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = logged / "logs" / "2" / "rank-0.log"
    ended: list[int] = []
    follower = threading.Thread(target=lambda: ended.append(main(["logs", "q1", "-f", "--rank", "0"])))
    follower.start()
    shown = ""

    def see(text: str) -> None:
        def look() -> bool:
            nonlocal shown
            shown += capfd.readouterr().out
            return text in shown

        until(look, lambda: f"{text!r} in {shown!r}")

    try:
        see("rank 0\n")
        with log.open("a") as more:
            more.write(" line\n")
        see("unfinished line\n")
        log.write_text("after the cap\n")  # shorter than before: emptied in place
        see("after the cap\n")
        third = logged / "logs" / "3"
        third.mkdir()
        (third / "rank-0.log").write_text("a new attempt\n")
        see("a new attempt\n")
        with (third / "rank-0.log").open("a") as more:
            more.write("last words without an end")
    finally:
        write_json(logged / "state.json", RunStatus(name="q1", state="finished"))
        follower.join(patient(20))
    assert not follower.is_alive()
    assert ended == [0]
    captured = capfd.readouterr()
    assert "last words without an end\n" in shown + captured.out
    assert "q1 is over (finished)" in captured.err


def test_doctor(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["doctor", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert set(findings) >= {"python", "torch", "CPU kernels", "CUDA kernels", "NVML", "ssh", "terminal", "state home"}
    assert all(finding["fix"] for finding in findings.values() if finding["level"] != "ok")
    assert exit_code == (1 if any(finding["level"] == "fail" for finding in findings.values()) else 0)
    assert str(home) in findings["state home"]["text"]


def test_doctor_fails_without_a_state_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert main(["doctor"]) == 1
    line, fix = _state_home_lines(capsys.readouterr().out)
    assert line.startswith("fail")
    assert "set XDG_STATE_HOME" in fix


def _state_home_lines(text: str) -> tuple[str, str]:
    lines = text.splitlines()
    index = next(number for number, line in enumerate(lines) if "state home" in line)
    return lines[index], lines[index + 1]


def test_doctor_warns_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROTOP_SSH", "no-such-ssh -F x")
    assert doctor._ssh().level == "warn"
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._torch().fix == "pip install '.[train]' in zerotop's source folder"
    monkeypatch.setattr(doctor, "_version", lambda package: "2.4.1+cu118")
    assert doctor._torch().level == "fail"
    monkeypatch.setattr(doctor, "_version", lambda package: "2.99")
    assert doctor._torch().level == "warn"
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w", encoding="latin-1"))  # noqa: SIM115
    assert "UTF-8" in doctor._terminal().fix
    sys.stdout.close()
