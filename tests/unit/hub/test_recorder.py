"""The recording: what goes in comes out, thinned where it may be, and a broken disk breaks nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import Event, Heartbeat, Hello, LogRecord, RunStatus, StepResult
from tests.harness.finetuning import data_report, evaluation
from tests.harness.waiting import until
from zerotop.hub import recorder as module
from zerotop.hub.recorder import (
    Recorder,
    earlier_evaluations,
    earlier_steps,
    on_network_file_system,
    read_messages,
    read_recording,
)
from zerotop.hub.thinning import thin, used_bytes
from zerotop.state.run import RunState


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "recording.sqlite", 1)
    yield made
    made.close()


def step(rank: int, number: int) -> StepResult:
    return StepResult(rank=rank, step=number, loss=1 / number, lr=0.1, grad_norm=None, step_ms=1.0, end_ns=number)


def beat(rank: int, number: int) -> Heartbeat:
    return Heartbeat(
        rank=rank, phase="forward", phase_since_ns=0, step=number, micro_step=1, micro_steps=2, entered_seq=number,
        completed_seq=number, progress_ns=0, now_ns=0,
    )  # fmt: skip


def test_a_recording_folds_to_where_the_run_ended(tmp_path: Path, recorder: Recorder) -> None:
    live = RunState()
    hello = Hello(
        run="q1", attempt=1, rank=0, local_rank=0, world_size=2, host="h", pid=1, boot_id="b", wall_s=0, mono_ns=0,
        device="cpu", config_digest="d", stage=2, precision="fp32", micro_batch=1, accumulation=1, global_batch=2,
    )  # fmt: skip
    said = [RunStatus(name="q1", state="running"), hello, hello.model_copy(update={"rank": 1})]
    for number in range(1, 200):
        said += [step(0, number), step(1, number), beat(0, number), beat(1, number)]
    said += [Event(rank=None, what="x", text=f"event {number}", wall_s=number) for number in range(50)]
    for message in said:
        live.apply(message)
        source = "supervisor" if getattr(message, "rank", None) is None else f"rank/{message.rank}"
        recorder.add(source, message)
    recorder.close()
    rows = list(read_recording(tmp_path))
    assert len(rows) < len(said) / 2  # thinned
    assert {row.source for row in rows} == {"supervisor", "rank/0", "rank/1"}
    replayed = RunState()
    replayed.apply_all(read_messages(tmp_path), 0)
    assert list(replayed.series) == list(live.series)  # every step of rank 0 is there
    assert list(replayed.events) == list(live.events)
    for rank in (0, 1):
        assert replayed.ranks[rank].step == live.ranks[rank].step
        assert replayed.ranks[rank].heartbeat == live.ranks[rank].heartbeat
        assert replayed.ranks[rank].hello == live.ranks[rank].hello


def test_a_recording_can_be_read_while_it_grows_and_is_private(tmp_path: Path, recorder: Recorder) -> None:
    recorder.add("rank/0", step(0, 1))
    until(lambda: len(list(read_messages(tmp_path))) == 1)
    recorder.add("rank/0", step(0, 2))
    until(lambda: len(list(read_messages(tmp_path))) == 2)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_attempts_share_one_recording(tmp_path: Path, recorder: Recorder) -> None:
    recorder.add("rank/0", step(0, 1))
    recorder.close()
    second = Recorder(tmp_path / "recording.sqlite", 2)
    second.add("rank/0", step(0, 2))
    second.close()
    assert [step.step for step in earlier_steps(tmp_path, 2)] == [1]
    assert [step.step for step in earlier_steps(tmp_path, 3)] == [1, 2]
    assert [step.step for step in earlier_steps(tmp_path, 3, limit=1)] == [2]  # thinned, the newest kept
    assert earlier_steps(tmp_path, 1) == []
    assert [(row.attempt, row.message.step) for row in read_recording(tmp_path)] == [(1, 1), (2, 2)]  # type: ignore[attr-defined]


def test_reports_and_evaluations_are_recorded_all_and_found_by_the_next_attempt(
    tmp_path: Path, recorder: Recorder
) -> None:
    said = [data_report(), data_report("evaluation"), *(evaluation(number) for number in range(5))]
    for message in said:
        recorder.add("rank/0", message)
    recorder.close()
    assert list(read_messages(tmp_path)) == said
    assert earlier_evaluations(tmp_path, 2) == said[2:]
    assert earlier_evaluations(tmp_path, 1) == [] == earlier_steps(tmp_path, 2)


def test_thinning_a_recording_leaves_its_data_reports(tmp_path: Path, recorder: Recorder) -> None:
    recorder.add("rank/0", data_report())
    for number in range(3000):
        recorder.add("rank/0", evaluation(number))
    recorder.close()
    with closing(sqlite3.connect(tmp_path / "recording.sqlite")) as database:
        limit = used_bytes(database) // 2
        thin(database, limit)
        assert used_bytes(database) <= limit
    kept = list(read_messages(tmp_path))
    assert kept[0] == data_report() and kept[-1] == evaluation(2999) and len(kept) > 100


def test_no_recording_is_empty(tmp_path: Path) -> None:
    assert list(read_messages(tmp_path)) == []
    (tmp_path / "recording.sqlite").touch()
    assert list(read_messages(tmp_path)) == []


def test_a_file_that_is_no_database_ends_the_recording_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "recording.sqlite").write_bytes(b"no database at all, but long enough to look at" * 100)
    broken = Recorder(tmp_path / "recording.sqlite", 1)
    until(lambda: bool(broken.error))
    broken.add("rank/0", step(0, 1))
    broken.close()
    assert "recording ended" in broken.error and not broken._rows


def test_sampled_kinds_are_recorded_once_a_second(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    kept = 0
    for _ in range(1000):
        clock[0] += 0.2
        kept += recorder._wanted("rank/1", beat(1, 1))
    assert 199 <= kept <= 201
    assert all(
        recorder._wanted("rank/1", LogRecord(rank=1, level="info", logger="x", text="t", wall_s=0)) for _ in range(5)
    )
    monkeypatch.undo()


def test_network_file_systems_are_told_by_the_longest_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = "dev / ext4 rw 0 0\nsrv:/home /home nfs4 rw 0 0\ndev /home/local xfs rw 0 0\nx /a\\040b lustre rw 0 0\n"
    monkeypatch.setattr(module.Path, "read_text", lambda self: mounts)
    for place, network in (
        ("/var/x", False),
        ("/home/me/x", True),
        ("/homework/x", False),
        ("/home/local/x", False),
        ("/a b/x", True),
    ):
        assert on_network_file_system(Path(place)) is network, place


def test_rows_carry_the_attempt_in_which_they_were_heard(tmp_path: Path, recorder: Recorder) -> None:
    for number in (1, 2, 3):
        recorder.add("rank/1", beat(1, number))  # the newest is held back: one a second
    recorder.begin_attempt(2)
    recorder.add("rank/1", beat(1, 2))
    recorder.close()
    rows = [(row.attempt, row.message.step) for row in read_recording(tmp_path)]  # type: ignore[attr-defined]
    assert rows == [(1, 1), (1, 3), (2, 2)]


def rows_of(folder: Path) -> list[tuple[str, bytes]]:
    with closing(sqlite3.connect(folder / "recording.sqlite")) as database:
        return database.execute("SELECT kind, body FROM messages ORDER BY id").fetchall()


class FullDisk:
    """In sqlite3's place: connections whose writes fail while `full` says so."""

    def __init__(self) -> None:
        self.full = False
        self._connect = sqlite3.connect

    def connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        disk = self

        class Connection(sqlite3.Connection):
            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                if disk.full:
                    raise sqlite3.OperationalError("database or disk is full")
                return super().executemany(*arguments)

        return self._connect(*arguments, **options, factory=Connection)


def test_a_disk_that_was_full_for_a_while_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sqlite3, "connect", disk.connect)
    monkeypatch.setattr(module, "COMMIT_S", 0.02)
    recorder = Recorder(tmp_path / "recording.sqlite", 1)
    try:
        told: list[str] = []

        def tells(words: str) -> bool:
            told.extend(recorder.news())
            return any(words in text for text in told)

        recorder.add("rank/0", step(0, 1))
        until(lambda: len(list(read_messages(tmp_path))) == 1)
        disk.full = True
        recorder.add("rank/0", step(0, 2))
        until(lambda: tells("recording paused until the disk can be written again: database or disk is full"))
        recorder.add("rank/0", step(0, 3))
        assert recorder.error == ""
        disk.full = False
        until(lambda: tells("recording continues"))
        assert [message.step for message in read_messages(tmp_path)] == [1, 2, 3]  # type: ignore[attr-defined]
        assert len(told) == 2
    finally:
        recorder.close()


def test_what_a_full_disk_costs_is_bounded_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sqlite3, "connect", disk.connect)
    monkeypatch.setattr(module, "COMMIT_S", 0.02)
    monkeypatch.setattr(module, "ROWS_KEPT", 10)
    disk.full = True
    recorder = Recorder(tmp_path / "recording.sqlite", 1)
    try:
        recorder.add("rank/0", step(0, 1))
        until(lambda: bool(recorder.news()))
        for number in range(2, 101):
            recorder.add("rank/0", step(0, number))
        assert len(recorder._rows) <= 10
        disk.full = False
        until(lambda: bool(recorder.news()))
    finally:
        recorder.close()
    messages = list(read_messages(tmp_path))
    assert [m.step for m in messages if isinstance(m, StepResult)] == list(range(91, 101))
    (gap,) = [m.text for m in messages if isinstance(m, LogRecord)]
    assert "nothing could be recorded since" in gap and "90 messages are missing" in gap


def test_a_disk_that_stays_full_ends_the_recording_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sqlite3, "connect", disk.connect)
    disk.full = True
    recorder = Recorder(tmp_path / "recording.sqlite", 1)
    recorder.add("rank/0", step(0, 1))
    recorder.close()
    assert not recorder._thread.is_alive() and "recording ended" in recorder.error


def test_a_recording_has_a_size_and_keeps_what_a_screen_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2 * 2**20
    monkeypatch.setattr(module, "LIMIT_BYTES", limit)
    monkeypatch.setattr(module, "COMMIT_S", 0.001)
    monkeypatch.setattr(module, "DENSE_STEPS", 10**6)
    recorder = Recorder(tmp_path / "recording.sqlite", 1)
    hello = Event(rank=None, what="x", text="the first event", wall_s=0)
    recorder.add("supervisor", hello)
    for number in range(1, 20_001):
        recorder.add("rank/0", step(0, number))
        if number % 10 == 0:
            recorder.add(
                "rank/0", LogRecord(rank=0, level="info", logger="l", text=f"{number} " + "x" * 2000, wall_s=0)
            )
        if number % 1000 == 0:
            until(lambda: not recorder._rows)
    recorder.close()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 2 * limit
    messages = list(read_messages(tmp_path))
    steps = [m.step for m in messages if isinstance(m, StepResult)]
    assert steps == sorted(steps) and steps[-1] == 20_000
    newer = sum(number > 15_000 for number in steps)
    older = sum(number <= 5_000 for number in steps)
    assert steps[0] == 1 and 0 < older < newer / 2  # the oldest are thinned most, and the run's beginning can be seen
    logs = [m.text for m in messages if isinstance(m, LogRecord)]
    assert logs and logs[-1].startswith("20000 ") and not logs[0].startswith("10 ")
    assert hello in messages


def test_events_are_the_last_to_go(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "recording.sqlite")) as database:
        database.execute(module._SCHEMA)
        row = (1, 0.0, "rank/0", "event", b"x" * 1000)
        database.executemany(module.INSERT, [(1, 0.0, "rank/0", "hello", b"{}"), *[row] * 4000])
        database.commit()
        thin(database, 2 * 2**20)
        assert used_bytes(database) < 2 * 2**20
    kinds = [kind for kind, _ in rows_of(tmp_path)]
    assert kinds[0] == "hello" and 500 < len(kinds) < 2000


def test_steps_and_statuses_are_sampled_in_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_STEPS", 50)
    recorder = Recorder(tmp_path / "recording.sqlite", 1)
    for number in range(1, 1001):
        recorder.add("rank/0", step(0, number))
        recorder.add("supervisor", RunStatus(name="q1", state="running", step=number))
    recorder.add("supervisor", RunStatus(name="q1", state="finished", step=1000))
    recorder.close()
    messages = list(read_messages(tmp_path))
    steps = [m.step for m in messages if isinstance(m, StepResult)]
    assert steps[:50] == list(range(1, 51)) and steps[-1] == 1000 and len(steps) < 200
    statuses = [m for m in messages if isinstance(m, RunStatus)]
    assert len(statuses) < 150 and statuses[-1].state == "finished"


def test_rows_of_a_newer_version_are_passed_over(tmp_path: Path, recorder: Recorder) -> None:
    recorder.add("rank/0", step(0, 1))
    recorder.close()
    with closing(sqlite3.connect(tmp_path / "recording.sqlite")) as database:
        bodies = [b'{"kind":"from 2031"}', b'{"kind":"step","step":"many"}', b"no JSON"]
        database.executemany(module.INSERT, [(1, 0.0, "rank/0", "step", body) for body in bodies])
        database.commit()
    assert [message.step for message in read_messages(tmp_path)] == [1]  # type: ignore[attr-defined]
