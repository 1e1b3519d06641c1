"""A report holds what a run left, in whatever state it is, and none of its secrets in any byte."""

from __future__ import annotations

import json
import sqlite3
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.finetuning import DataReport, DataSample, Evaluation, Generation, TokenRun
from runtime.wire.messages import Ack, Command, CommandRecord, Event, LogRecord, RunStatus, StepResult
from runtime.wire.rundir import RunFile, write_json
from tests.harness.waiting import until
from zerotop import cli
from zerotop.bugreport import recording
from zerotop.bugreport.contents import HEAD_BYTES, TAIL_BYTES, run_files
from zerotop.hub.recorder import Recorder, read_messages
from zerotop.rundir.paths import runs_home

SECRETS = {
    "config": "hf_abcdefghijklmnopqrstuv",
    "log": "hunter2-of-the-log",
    "event": "sk-abcdefghijklmnopqrstuvwx",
    "url": "pass-of-the-url",
    "script": "argument-of-the-script",
    "environment": "value-of-the-environment",
    "stacks": "AKIAABCDEFGHIJKLMNOP",
    "command": "header-of-the-command",
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`make(state="failed")`: the directory of a run that has ended, with a secret of every kind in its files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRETS["environment"])
    monkeypatch.chdir(tmp_path)

    def begin(name: str = "q1", state: str = "failed") -> Path:
        path = runs_home() / name
        logs = path / "logs" / "1"
        (logs / "evidence-1").mkdir(parents=True)
        script = ["train.py", "--api-key", SECRETS["script"]]
        run = RunFile(
            name=name, created_wall_s=time.time(), attempt=1, host="box", boot_id="", nproc=2, device="cpu",
            config_path="c.json", config_folder="/", sockets=str(tmp_path / "none"), script=script,
        )  # fmt: skip
        write_json(path / "run.json", run)
        write_json(path / "state.json", RunStatus(name=name, state=state, attempt=1, step=7, reason="rank 1 failed"))
        (path / "config.json").write_text(json.dumps({"hub": {"token": SECRETS["config"]}}))
        (logs / "rank-0.log").write_text(f"env: DB_PASSWORD={SECRETS['log']}\nsaw {SECRETS['environment']}\n")
        (logs / "rank-1.log").write_text(f"clone https://bob:{SECRETS['url']}@host/r.git\nValueError: x\n")
        (logs / "stacks-1.txt").write_text(f'verdict\n  File "/x/{SECRETS["stacks"]}.py", line 1 in f\n')
        (logs / "evidence-1" / "flight-rank-0.json").write_text(json.dumps({"rank": 0, "wall_s": 1.0}))
        recorder = Recorder(path / "recording.sqlite", 1)
        now = time.time()
        for message in messages(now):
            recorder.add("rank/0", message)
        recorder.close()
        return path

    return begin


def messages(now: float) -> list[Any]:
    header = {"note": f"Authorization: Bearer {SECRETS['command']}"}
    command = Command(id="c1", name="set", arguments=header, who="me@box:1", number=1)
    sample = DataSample(source="data.jsonl", tokens=3, trained=3, runs=[TokenRun(text="private words", trained=True)])
    return [
        Event(rank=None, what="hang", text=f"key {SECRETS['event']} in it", wall_s=now),
        LogRecord(rank=0, level="error", logger="x", text=f"password: {SECRETS['log']}", wall_s=now),
        CommandRecord(command=command, ack=Ack(id="c1", number=1, state="accepted")),
        CommandRecord(command=command, ack=Ack(id="c1", number=1, state="applied", step=3)),
        StepResult(rank=0, step=7, loss=1.5, lr=0.1, grad_norm=1.0, step_ms=10.0, end_ns=1),
        DataReport(
            role="train", files=["data.jsonl"], format="text", train_on="all", rows=1, samples=1, tokens=3,
            trained_tokens=3, seq_len=8, sequences=1, examples=[sample],
        ),
        Evaluation(
            rank=0, step=7, loss=1.0, wall_s=now, generations=[Generation(prompt="private prompt", text="private")]
        ),
    ]  # fmt: skip


def unpacked(path: Path) -> dict[str, bytes]:
    """Name -> content, without the folder that everything is in."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(path) as archive_tar:
            members = {member.name: archive_tar.extractfile(member).read() for member in archive_tar}  # type: ignore[union-attr]
            assert all((m.uid, m.gid, m.uname, m.gname) == (0, 0, "", "") for m in archive_tar)
    return {name.partition("/")[2]: content for name, content in members.items()}


@pytest.mark.parametrize("out", ["r.tar.gz", "r.zip"])
def test_a_report_of_a_failed_run_has_everything_but_its_secrets(
    make: Callable[..., Path], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    assert cli.main(["report", "q1", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    path = Path(out)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and document["bytes"] == path.stat().st_size
    files = unpacked(path)
    assert [entry["name"] for entry in document["files"]] == list(files)
    assert next(iter(files)) == "manifest.json" and {
        "summary.txt", "status.json", "versions.json", "environment.json", "doctor.json", "events.json", "run.json",
        "commands.json", "state.json", "config.json", "logs/1/rank-0.log", "logs/1/rank-1.log", "logs/1/stacks-1.txt",
        "logs/1/evidence-1/flight-rank-0.json", "recording.sqlite",
    } <= set(files)  # fmt: skip
    for name, content in files.items():
        for kind, secret in SECRETS.items():
            assert secret.encode() not in content, (name, kind)
        assert b"private" not in content, name
    manifest = json.loads(files["manifest.json"])
    assert manifest["removed"] == document["removed"] and manifest["removed"]["secret setting"] >= 4
    assert manifest["removed"]["user and password in a URL"] == 1
    assert "3 samples of training data and generated texts were left out" in manifest["notes"]
    assert "rank 1 failed" in files["summary.txt"].decode()
    assert [event["kind"] for event in json.loads(files["events.json"])] == ["event", "log"]
    (command,) = json.loads(files["commands.json"])
    assert command["ack"]["state"] == "applied"
    versions = json.loads(files["versions.json"])
    assert versions["packages"]["zerotop"] and versions["cpu"] and versions["memory_bytes"] > 0


def test_the_recording_in_it_can_be_read(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make()
    assert cli.main(["report", "q1", "r.tgz"]) == 0
    (tmp_path / "recording.sqlite").write_bytes(unpacked(Path("r.tgz"))["recording.sqlite"])
    kinds = [type(message).__name__ for message in read_messages(tmp_path)]
    assert kinds == [type(message).__name__ for message in read_messages(path)] and "StepResult" in kinds


def test_what_a_run_did_not_leave_is_missing_and_nothing_else(make: Callable[..., Path]) -> None:
    path = make()
    (path / "recording.sqlite").write_bytes(b"not a database at all" * 100)
    (path / "config.json").unlink()
    (path / "logs" / "1" / "rank-1.log").unlink()
    (path / "logs" / "1" / "rank-1.log").symlink_to("/etc/hostname")  # a link is not followed
    assert cli.main(["report", "q1", "r.tar.gz"]) == 0
    files = unpacked(Path("r.tar.gz"))
    assert "logs/1/rank-0.log" in files and not {"recording.sqlite", "config.json", "logs/1/rank-1.log"} & set(files)
    assert any("can't be read further" in note for note in json.loads(files["manifest.json"])["notes"])


def test_a_long_log_is_cut_at_line_ends_and_says_so(make: Callable[..., Path]) -> None:
    path = make()
    log = path / "logs" / "1" / "rank-0.log"
    line = b"x" * 99 + b"\n"
    log.write_bytes(b"first\n" + line * ((HEAD_BYTES + TAIL_BYTES) // 100 + 1000) + b"last\n")
    (part,) = [part for part in run_files(path) if part.name.endswith("rank-0.log")]
    assert part.content.startswith(b"first\n") and part.content.endswith(b"\nlast\n")
    assert part.of_bytes == log.stat().st_size and len(part.content) < HEAD_BYTES + TAIL_BYTES + 100
    lines = part.content.split(b"\n")
    assert sum(b"bytes left out" in text for text in lines) == 1
    assert all(len(text) in (0, 4, 5, 99) or b"left out" in text for text in lines)
    log.write_bytes(b"secret=" + b"y" * (HEAD_BYTES + TAIL_BYTES + 1))  # one line without an end: no part of it
    (part,) = [part for part in run_files(path) if part.name.endswith("rank-0.log")]
    assert b"y" not in part.content.replace(b"bytes", b"")


def test_a_long_recording_keeps_its_newest_messages(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    monkeypatch.setattr(recording, "ROWS_BYTES", 600)
    assert cli.main(["report", "q1", "r.tar.gz"]) == 0
    files = unpacked(Path("r.tar.gz"))
    notes = json.loads(files["manifest.json"])["notes"]
    assert any(note.startswith("of the recording the newest ") for note in notes)
    Path("copy.sqlite").write_bytes(files["recording.sqlite"])
    database = sqlite3.connect("copy.sqlite")
    (newest,) = database.execute("SELECT kind FROM messages ORDER BY id DESC LIMIT 1").fetchone()
    database.close()
    assert newest == "evaluation"


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("there.tar.gz", "exists: choose another name"),
        ("r.rar", "expected a folder or a name that ends in .tar.gz, .tgz, .zip, got r.rar"),
        ("none/r.zip", "there is no folder none"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_done(
    make: Callable[..., Path], out: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    Path("there.tar.gz").write_text("x")
    assert cli.main(["report", "q1", out]) == 2
    assert says in capsys.readouterr().err and Path("there.tar.gz").read_text() == "x"


def test_a_folder_gets_a_file_with_the_run_in_its_name(make: Callable[..., Path], tmp_path: Path) -> None:
    make()
    (tmp_path / "reports").mkdir()
    assert cli.main(["report", "q1", "reports"]) == 0
    until(lambda: [path.name for path in (tmp_path / "reports").iterdir()], "the report")
    (made,) = (tmp_path / "reports").iterdir()
    assert made.name.startswith("zerotop-report-q1-") and made.name.endswith(".tar.gz")
