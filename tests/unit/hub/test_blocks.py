"""Old samples are packed, thin out with age, and are read as if they were rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import Heartbeat, RunStatus, StepResult
from tests.harness.longrun import BEGIN_S, SpokenRun, create, insert, pack
from zerotop.hub import blocks
from zerotop.hub.recorder import read_recording
from zerotop.hub.thinning import thin, thin_steps, used_bytes

HOUR_S = 3600.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    made = create(tmp_path / "recording.sqlite")
    yield made
    made.close()


def record(database: sqlite3.Connection, run: SpokenRun, seconds: int) -> None:
    for _ in range(seconds):
        run.second()
    insert(database, run.take())


def levels(database: sqlite3.Connection) -> dict[int, int]:
    return dict(database.execute("SELECT level, count(*) FROM blocks GROUP BY level"))


def counted(path: Path, kind: type) -> int:
    return sum(isinstance(row.message, kind) for row in read_recording(path))


def test_what_is_packed_reads_as_before(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 200)
    before = list(read_recording(tmp_path))
    (rows,) = database.execute("SELECT count(*) FROM messages").fetchone()
    pack(database, run.wall_s + blocks.PACK_AFTER_S)
    (left,) = database.execute("SELECT count(*) FROM messages").fetchone()
    assert levels(database) == {0: 3} and left < rows / 3
    after = list(read_recording(tmp_path))
    assert [(row.attempt, row.source, row.message) for row in after] == [
        (row.attempt, row.source, row.message) for row in before
    ]
    assert all(abs(one.wall_s - other.wall_s) < 0.001 for one, other in zip(after, before, strict=True))


def test_young_samples_stay_rows(database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 100)
    pack(database, run.wall_s)
    assert levels(database) == {}
    pack(database, BEGIN_S + 60 + blocks.PACK_AFTER_S)
    assert levels(database) == {0: 1}


def test_samples_thin_to_ten_seconds_after_an_hour_and_to_a_minute_after_a_day(
    tmp_path: Path, database: sqlite3.Connection
) -> None:
    run = SpokenRun(accumulation=1)
    record(database, run, 3600)
    beats = counted(tmp_path, Heartbeat)
    pack(database, run.wall_s + HOUR_S)
    assert set(levels(database)) == {0, 1} or set(levels(database)) == {1}
    pack(database, run.wall_s + HOUR_S + 600)
    assert set(levels(database)) == {1}
    in_tens = counted(tmp_path, Heartbeat)
    assert beats / 11 < in_tens < beats / 9
    pack(database, run.wall_s + 25 * HOUR_S)
    assert set(levels(database)) == {2}
    assert beats / 66 < counted(tmp_path, Heartbeat) < beats / 54
    assert counted(tmp_path, StepResult) > 3600  # every step of rank 0 is still there


def test_of_a_slot_the_newest_sample_of_each_source_stays(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 600)
    newest = {
        message.rank: message.step
        for wall, _, message in ((row.wall_s, row.source, row.message) for row in read_recording(tmp_path))
        if isinstance(message, Heartbeat) and wall < BEGIN_S + 10
    }
    pack(database, run.wall_s + 2 * HOUR_S)
    first = [row.message for row in read_recording(tmp_path) if isinstance(row.message, Heartbeat)][:2]
    assert {beat.rank: beat.step for beat in first} == newest


def test_changes_of_the_status_stay_rows_and_mere_progress_is_packed(database: sqlite3.Connection) -> None:
    def status(state: str, step: int) -> tuple[float, str, RunStatus]:
        return BEGIN_S + step, "supervisor", RunStatus(name="q1", state=state, step=step)

    insert(database, [status("running", step) for step in range(20)])
    insert(database, [status("paused", 20), status("paused", 21), status("running", 22)])
    pack(database, BEGIN_S + 60 + blocks.PACK_AFTER_S)
    kept = [row[0] for row in database.execute("SELECT body FROM messages ORDER BY id")]
    assert [b'"paused"' in body for body in kept] == [False, True, False]


def test_a_second_packer_continues_where_the_first_one_ended(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 120)
    before = [row.message for row in read_recording(tmp_path)]
    pack(database, BEGIN_S + 60 + blocks.PACK_AFTER_S)
    pack(database, BEGIN_S + 240 + blocks.PACK_AFTER_S)
    assert levels(database)[0] >= 2
    assert [row.message for row in read_recording(tmp_path)] == before


def test_blocks_are_thinned_early_before_anything_else_is_lost(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun(8, gpu=True)
    record(database, run, 900)
    steps = counted(tmp_path, StepResult)
    pack(database, run.wall_s + blocks.PACK_AFTER_S)
    blocks_bytes = database.execute("SELECT sum(length(body)) FROM blocks").fetchone()[0]
    limit = int((used_bytes(database) - blocks_bytes * 0.5) / 0.75)
    thin(database, limit)
    assert used_bytes(database) <= limit and set(levels(database)) & {1, 2}
    assert 0 < counted(tmp_path, StepResult) < steps


def test_a_damaged_block_is_passed_over(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 180)
    pack(database, run.wall_s + blocks.PACK_AFTER_S)
    whole = len(list(read_recording(tmp_path)))
    with database:
        database.execute("UPDATE blocks SET body = x'00' WHERE id = 1")
    assert 0 < len(list(read_recording(tmp_path))) < whole


def test_the_curve_has_at_most_so_many_steps_and_its_end_is_the_densest(database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 400)
    pack(database, run.wall_s + blocks.PACK_AFTER_S)
    for _ in range(3):
        thin_steps(database, 200)
    query = "SELECT body FROM messages WHERE kind = 'step' AND source = 'rank/0' ORDER BY id"
    steps = [json.loads(body)["step"] for (body,) in database.execute(query)]
    assert len(steps) <= 200 and steps[-1] == 400 and steps[0] < 20
    assert steps[-1] - steps[-2] == 1 < steps[1] - steps[0]


def test_a_pack_that_fails_is_made_again(tmp_path: Path, database: sqlite3.Connection) -> None:
    run = SpokenRun()
    record(database, run, 120)
    before = [row.message for row in read_recording(tmp_path)]
    packer = blocks.Packer()
    database.execute("CREATE TRIGGER full BEFORE DELETE ON messages BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(sqlite3.DatabaseError, match="disk is full"):
        packer.work(database, run.wall_s + blocks.PACK_AFTER_S)
    assert levels(database) == {}
    database.execute("DROP TRIGGER full")
    assert packer.work(database, run.wall_s + blocks.PACK_AFTER_S) and levels(database) == {0: 1}
    assert [row.message for row in read_recording(tmp_path)] == before
