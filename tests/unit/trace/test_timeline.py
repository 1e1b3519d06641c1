"""The timeline of a recording as a trace."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.fakerun import write_run
from tests.harness.recordings import MS, STEP_MS, WALL_S, messages_of, record
from tests.harness.trace_check import Slice, Trace
from zerotop.cli import main
from zerotop.hub import timeline as dense


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that has ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    ended = RunStatus(name="q1", state="finished")
    return write_run(tmp_path / "state", "q1", Path("/nowhere"), ended, created_wall_s=WALL_S - 10)


def names(slices: list[Slice]) -> list[str]:
    return [one[2]["name"] for one in slices]


def test_every_phase_and_collective_is_on_its_rank_s_track(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run)
    assert main(["trace", "q1", "out.json.gz", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["first_step"], answer["last_step"], answer["complete"], answer["ranks"]) == (1, 10, True, 2)
    trace = Trace(Path("out.json.gz"))
    assert answer["bytes"] == Path("out.json.gz").stat().st_size
    assert sorted(trace.processes.values()) == ["rank 0 · cpu · node-b", "rank 1 · cpu · node-b", "the run"]
    for rank in ("rank 0", "rank 1"):
        assert names(trace.track(rank, "steps")) == [f"step {step}" for step in range(1, 11)]
        assert names(trace.track(rank, "phases")) == ["data", "forward", "backward", "step"] * 10
        assert names(trace.track(rank, "collectives")) == ["reduce_scatter", "reduce_scatter", "all_gather"] * 10
    first = trace.track("rank 0", "phases")[0]
    assert first[0] == pytest.approx((10 + STEP_MS / 1000) * 1e6)  # the run was created 10 s before
    collective = trace.track("rank 1", "collectives")[0]
    assert collective[1] - collective[0] == pytest.approx(5000)  # it waited 1 ms more than the 4 ms of the transfer
    assert collective[2]["args"] == {"number": 4, "bytes": 4096, "step": 1, "waited_ms": 1.0, "queued_ms": 0.0}
    assert [mark["args"]["text"] for mark in trace.marks] == ["a note"]


def test_steps_choose(run: Path) -> None:
    record(run)
    assert main(["trace", "q1", "--steps", "4:6"]) == 0
    trace = Trace(Path("q1-trace.json.gz"))
    assert names(trace.track("rank 1", "steps")) == ["step 4", "step 5", "step 6"]
    assert len(trace.track("rank 1", "collectives")) == 9
    assert trace.metadata["steps"] == [4, 6]


def test_nodes_are_aligned_by_the_ends_of_collectives(run: Path) -> None:
    """The second node has booted later, and its wall clock is 40 s ahead."""
    nodes = {1: ("other", 5_000 * MS, WALL_S + 40)}
    record(run, nodes=nodes)
    assert main(["trace", "q1", "out.json"]) == 0
    trace = Trace(Path("out.json"))
    ours, theirs = (trace.track(rank, "collectives") for rank in ("rank 0", "rank 1"))
    assert [one[1] for one in theirs] == pytest.approx([one[1] for one in ours])
    clocks = {clock["host"]: clock for clock in trace.metadata["clocks"]}
    assert clocks["node-b"]["reference"] and not clocks["node-other"]["reference"]
    assert clocks["node-other"]["clock"] == "ends of 30 collectives in common with node-b"
    assert clocks["node-other"]["spread_us"] == pytest.approx(0, abs=1)


def test_older_steps_are_samples_and_it_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run)
    with closing(sqlite3.connect(run / "recording.sqlite")) as database, database:
        database.execute("DELETE FROM timeline")  # as if all of it were older than ten minutes
    assert main(["trace", "q1", "--steps", "1:10"]) == 0
    assert "so there are gaps" in capsys.readouterr().err
    trace = Trace(Path("q1-trace.json.gz"))
    assert 0 < len(trace.track("rank 0", "phases")) < 40
    assert trace.metadata["complete"] is False


def test_a_later_attempt_follows_on_the_same_track(run: Path) -> None:
    """Collectives count from 1 again, and steps are replayed."""
    record(run, range(1, 11))
    record(run, range(9, 15), nodes=dict.fromkeys(range(2), ("b", 2000 * MS, WALL_S + 2)), attempt=2)
    assert main(["trace", "q1"]) == 0
    steps = names(Trace(Path("q1-trace.json.gz")).track("rank 0", "steps"))
    assert steps == [f"step {step}" for step in [*range(1, 11), *range(9, 15)]]


CRASH = """
import os, signal, sqlite3, sys, time
from pathlib import Path
from tests.harness.fakehub import hello
from tests.harness.recordings import messages_of
from zerotop.hub import timeline
from zerotop.hub.recorder import Recorder

run = Path(sys.argv[1])
recorder = Recorder(run / "recording.sqlite", 1)
for rank in range(2):
    recorder.add(f"rank/{rank}", hello(rank))
    for message in messages_of(rank, range(1, 6), 0):
        recorder.add(f"rank/{rank}", message)
database = timeline.open_recording(run)
while sum(len(row.messages) for row in timeline.read_rows(database, "rank/1")) < 10:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_crash(run: Path) -> None:
    """The process that records is killed, and leaves a write-ahead log behind."""
    words = [sys.executable, "-c", CRASH, str(run)]
    killed = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert main(["trace", "q1"]) == 0
    trace = Trace(Path("q1-trace.json.gz"))
    assert all(len(trace.track(f"rank {rank}", "phases")) == 20 for rank in range(2))


def test_to_standard_output(run: Path, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    record(run)
    words = [sys.executable, "-m", "zerotop", "trace", "q1", "-"]
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    (tmp_path / "piped.json.gz").write_bytes(out)
    assert len(Trace(tmp_path / "piped.json.gz").track("rank 0", "steps")) == 10


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nope"], 2, "no run called 'nope'"),
        (["q1", "--last", "soon"], 2, "--last: expected a time above 0 such as 30s, 5m or 1h, got 'soon'"),
        (["q1", "--last", "0s"], 2, "--last: expected a time above 0"),
        (["q1", "--steps", "9:3"], 2, "--steps: expected A:B with A not above B"),
        (["q1", "--steps", "7"], 2, "--steps: expected A:B"),
        (["q1", "--steps", "50:60"], 1, "has no step from 50 to 60: it has steps 1 to 10"),
        (["q1", "no/such/folder/x.json"], 1, "No such file or directory"),
        (["box:q1"], 2, "ssh box zerotop trace q1 - > trace.json.gz"),
    ],
)
def test_bad_usage(words: list[str], code: int, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run)
    before = sorted(Path.cwd().iterdir())
    assert main(["trace", *words]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert sorted(Path.cwd().iterdir()) == before


def test_a_run_without_a_recording(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "q1"]) == 1
    assert "q1 has no recording" in capsys.readouterr().err


def test_the_timeline_keeps_minutes_and_bytes(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "recording.sqlite")) as database:
        dense.create(database)
        table = dense.TimelineTable()
        for minute in range(30):
            for message in messages_of(0, range(10 * minute, 10 * minute + 10), 0):
                table.add(1, 60.0 * minute, "rank/0", message)
            table.write(database)
        dense.prune(database, 60.0 * 29)
        extent = dense.extent(database)
        assert extent == (60.0 * 19, 60.0 * 29)
        steps = {
            span[1]
            for row in dense.read_rows(database, "rank/0")
            for one in row.messages
            for span in one.get("spans", [])
        }
        assert steps == set(range(190, 300))
        (whole,) = database.execute("SELECT sum(length(body)) FROM timeline").fetchone()
        dense.prune(database, 60.0 * 29, kept_bytes=whole // 2)
        (kept,) = database.execute("SELECT sum(length(body)) FROM timeline").fetchone()
        assert 0 < kept <= whole // 2
        assert dense.extent(database) == (pytest.approx(60.0 * 25, abs=180), 60.0 * 29)
