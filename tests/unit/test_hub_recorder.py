"""The recording: what goes in comes out, thinned where it may be, and a broken disk breaks nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import Event, Heartbeat, Hello, LogRecord, RunStatus, StepResult
from zerotop.hub import recorder as module
from zerotop.hub.recorder import Recorder, earlier_steps, on_network_file_system, read_messages, read_recording
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


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    assert "the recording ends here" in broken.error and not broken._rows


def test_sampled_kinds_thin_out_as_the_run_grows_old(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [recorder._start]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def kept_in_an_hour() -> int:
        kept = 0
        for _ in range(3600):
            clock[0] += 1.0
            kept += recorder._wanted("rank/1", beat(1, 1))
        return kept

    first = kept_in_an_hour()
    clock[0] += 9 * 3600
    later = kept_in_an_hour()
    assert first == 3600 and 300 < later < 420  # about every tenth in the eleventh hour
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
