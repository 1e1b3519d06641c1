"""The recording: what the hub received, in RUN/recording.sqlite. A thread of its own writes it."""

from __future__ import annotations

import heapq
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from runtime.wire.base import Message
from runtime.wire.codec import ProtocolError, decode_up, encode
from runtime.wire.finetuning import Evaluation
from runtime.wire.judgement import TimeReport
from runtime.wire.messages import Collectives, Heartbeat, LogRecord, Memory, Phases, RunStatus, StepResult
from runtime.wire.node import NodeStats
from zerotop.hub import blocks, timeline
from zerotop.hub.thinning import LIMIT_BYTES, thin, thin_steps, used_bytes

COMMIT_S = 1.0
SAMPLE_S = 1.0
"""Sampled kinds are recorded once in this time, and thin out later (blocks.py)."""
DENSE_STEPS = 10_000
"""The first steps of rank 0, which reports the figures of the run, are all kept; later ones are sampled too."""
ROWS_KEPT = 20_000
BYTES_KEPT = 32 * 2**20
"""Rows kept in memory while the disk is full; beyond that the oldest are dropped and counted."""
_SAMPLED = (StepResult, Memory, Heartbeat, NodeStats, Collectives, Phases, RunStatus, TimeReport)
_NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb2 smb3 smbfs lustre gpfs beegfs beegfs_nodev ceph fuse.ceph fuse.sshfs "  # noqa: SIM905
    "fuse.glusterfs glusterfs afs 9p pvfs2 orangefs wekafs panfs virtiofs".split()
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages(
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, wall_s REAL NOT NULL, source TEXT NOT NULL, kind TEXT NOT NULL,
    body BLOB NOT NULL)
"""

_INDEX = "CREATE INDEX IF NOT EXISTS by_kind ON messages(kind, source, id)"
INSERT = "INSERT INTO messages(attempt, wall_s, source, kind, body) VALUES (?, ?, ?, ?, ?)"
_EARLIER = "FROM messages WHERE kind = ? AND source = 'rank/0' AND attempt < ?"
_SELECT = "SELECT id, attempt, wall_s, source, kind, body FROM messages ORDER BY id"

_Row = tuple[int, float, str, str, bytes]


class Recorded(NamedTuple):
    """One row of a recording. `wall_s` is the time at which the hub received it."""

    attempt: int
    wall_s: float
    source: str
    message: Message


class Recorder:
    """Records until `close`. The run continues whatever happens here: a disk that is full or gone is retried, and
    the gap is reported and recorded; a damaged file ends the recording (`error`). `news` returns what to report."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.error: str = ""
        self._path = path
        self._attempt = attempt
        self._last: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], Message] = {}
        self._dense_steps = 0
        self._status: RunStatus | None = None
        self._rows: deque[_Row] = deque()
        self._timeline = timeline.TimelineTable()
        self._packer = blocks.Packer()
        self._bytes = 0
        self._dropped = 0
        self._standing_since: float | None = None
        """Wall time since which nothing could be written."""
        self._news: deque[str] = deque(maxlen=100)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._thread = threading.Thread(target=self._write_until_closed, name="recorder", daemon=True)
        self._thread.start()

    # ---- the hub's thread ------------------------------------------------------------------------------------------
    def add(self, source: str, message: Message) -> None:
        """Record `message`, unless it is of a sampled kind and one like it was just recorded. Never blocks on the
        disk."""
        if self.error:
            return
        self._timeline.add(self._attempt, time.time(), source, message)
        if self._wanted(source, message):
            self._append(source, message)

    def news(self) -> list[str]:
        """What has happened to the recording since the last call, as text."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _append(self, source: str, message: Message) -> None:
        row = (self._attempt, time.time(), source, str(getattr(message, "kind", "")), encode(message))
        with self._lock:
            self._rows.append(row)
            self._bytes += len(row[-1])
            while len(self._rows) > ROWS_KEPT or self._bytes > BYTES_KEPT:
                self._bytes -= len(self._rows.popleft()[-1])
                self._dropped += 1

    def begin_attempt(self, attempt: int) -> None:
        """Rows from here on belong to `attempt`; the previous one ends with the newest message of each sampled kind."""
        self._let_go()
        self._last.clear()
        self._attempt = attempt

    def close(self) -> None:
        """Write what is left and the newest message of each sampled kind, so that the recording ends where the run did.

        Bounded: gives up after some seconds on a disk that does not respond.
        """
        self._let_go()
        self._closing.set()
        self._thread.join(timeout=5)

    def _let_go(self) -> None:
        for (source, _), message in self._held.items():
            self._append(source, message)
        self._held.clear()

    def _wanted(self, source: str, message: Message) -> bool:
        if not isinstance(message, _SAMPLED):
            return True
        if isinstance(message, StepResult) and message.rank == 0 and self._dense_steps < DENSE_STEPS:
            self._dense_steps += 1
            return True
        now = time.monotonic()
        key = (source, message.kind)
        changed = isinstance(message, RunStatus) and self._is_change(message)
        # A tenth of slack: a 1 Hz source must not lose every second sample to jitter.
        if not changed and now - self._last.get(key, -SAMPLE_S) < 0.9 * SAMPLE_S:
            self._held[key] = message
            return False
        self._last[key] = now
        self._held.pop(key, None)
        return True

    def _is_change(self, status: RunStatus) -> bool:
        """Whether the status changed in more than its step."""
        before, self._status = self._status, status
        return before is None or before.model_copy(update={"step": status.step}) != status

    # ---- the writing thread ----------------------------------------------------------------------------------------
    def _write_until_closed(self) -> None:
        while True:
            last_try = self._closing.is_set()
            try:
                with closing(self._open()) as database:
                    while not self._closing.wait(COMMIT_S):
                        self._flush(database)
                    self._flush(database)
                return
            except sqlite3.OperationalError as error:  # the disk is full, gone, or does not answer: it may come back
                if last_try:
                    self._end(error)
                    return
                self._stand_still(error)
                self._closing.wait(COMMIT_S)
            except sqlite3.Error as error:
                self._end(error)
                return

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=5)
        try:
            journal = "TRUNCATE" if on_network_file_system(self._path) else "WAL"
            database.execute(f"PRAGMA journal_mode={journal}")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(f"PRAGMA journal_size_limit={LIMIT_BYTES // 16}")
            create(database)
            database.commit()
        except BaseException:
            database.close()
            raise
        return database

    def _flush(self, database: sqlite3.Connection) -> None:
        """Write the waiting rows. On an error all of them stay queued, and the error is raised."""
        with self._lock:
            rows, self._rows = self._rows, deque()
            self._bytes = 0
            dropped, self._dropped = self._dropped, 0
        try:
            with database:
                database.executemany(INSERT, [*rows, *self._gap(dropped)])
                self._timeline.write(database)
        except BaseException:
            with self._lock:
                self._rows.extendleft(reversed(rows))
                self._bytes += sum(len(row[-1]) for row in rows)
                self._dropped += dropped
            raise
        if self._standing_since is not None:
            self._standing_since = None
            self._news.append("recording continues" + (f"; {_missing(dropped)}" if dropped else ""))
        if self._packer.work(database, time.time()):  # one block at a time: what waits to be written goes first
            thin_steps(database)
        if rows and used_bytes(database) > LIMIT_BYTES:
            thin(database, LIMIT_BYTES)

    def _gap(self, dropped: int) -> list[_Row]:
        """The row that reports the dropped rows."""
        if not dropped or self._standing_since is None:
            return []
        began = time.strftime("%H:%M:%S", time.localtime(self._standing_since))
        text = f"nothing could be recorded since {began}: {_missing(dropped)}"
        record = LogRecord(rank=None, level="warning", logger="zerotop.hub", text=text, wall_s=time.time())
        return [(self._attempt, record.wall_s, "supervisor", record.kind, encode(record))]

    def _stand_still(self, error: sqlite3.Error) -> None:
        if self._standing_since is None:
            self._standing_since = time.time()
            self._news.append(f"recording paused until the disk can be written again: {error}")

    def _end(self, error: sqlite3.Error) -> None:
        self.error = f"recording ended: {error}"
        self._news.append(self.error)
        with self._lock:
            self._rows.clear()


def create(database: sqlite3.Connection) -> None:
    """Create the tables of a recording unless they are there."""
    database.execute(_SCHEMA)
    database.execute(_INDEX)
    timeline.create(database)
    blocks.create(database)


def _missing(count: int) -> str:
    return f"{count:,} messages are missing from it"


def read_recording(run: Path) -> Iterator[Recorded]:
    """Rows of RUN/recording.sqlite of all attempts, oldest first; none for a run without a recording.

    Works while the run is being recorded. Kinds and values unknown to this version are skipped. Raises sqlite3.Error
    for a damaged file.
    """
    path = run / "recording.sqlite"
    if not path.exists():
        return
    database = timeline.open_recording(run)
    try:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'messages'").fetchone():
            return  # the recorder has only just made the file
        rows = (blocks.Row(*values) for values in database.execute(_SELECT))
        for row in heapq.merge(blocks.packed_rows(database), rows, key=lambda row: row.number):
            try:
                message = decode_up(row.body)
            except ProtocolError:
                continue
            if message is not None:
                yield Recorded(row.attempt, row.wall_s, row.source, message)
    finally:
        database.close()


def read_messages(run: Path) -> Iterator[Message]:
    """The recorded messages; folded into a RunState they give the state at the end of the recording."""
    for row in read_recording(run):
        yield row.message


def newest_row_wall_s(run: Path) -> float | None:
    """When the newest row of RUN/recording.sqlite was received; None if there is none, or it can't be read now."""
    if not (run / "recording.sqlite").exists():
        return None
    try:
        with closing(timeline.open_recording(run)) as database:
            row = database.execute("SELECT wall_s FROM messages ORDER BY id DESC LIMIT 1").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else float(row[0])


def earlier_steps(run: Path, attempt: int, limit: int = 1000) -> list[StepResult]:
    """Rank 0's steps of the attempts before `attempt`, evenly thinned to about `limit`: the history of a resumed run,
    and of a branch.

    Empty if there is none, or if the recording is damaged.
    """
    return [step for step in _earlier(run, attempt, "step", limit) if isinstance(step, StepResult)]


def earlier_evaluations(run: Path, attempt: int, limit: int = 1000) -> list[Evaluation]:
    """The same for evaluations."""
    return [found for found in _earlier(run, attempt, "evaluation", limit) if isinstance(found, Evaluation)]


def _earlier(run: Path, attempt: int, kind: str, limit: int) -> list[Message]:
    path = run / "recording.sqlite"
    if not path.exists():
        return []
    try:
        database = timeline.open_recording(run)
        try:
            (count,) = database.execute(f"SELECT count(*) {_EARLIER}", (kind, attempt)).fetchone()
            stride = max(1, -(-count // limit))
            rows = database.execute(f"SELECT body {_EARLIER} ORDER BY id", (kind, attempt))
            return [decode_up(body) for index, (body,) in enumerate(rows) if (count - 1 - index) % stride == 0]
        finally:
            database.close()
    except (sqlite3.Error, ProtocolError):
        return []


def on_network_file_system(path: Path) -> bool:
    """Whether `path` is on a file system where SQLite cannot use its shared-memory log (WAL). False if the system
    does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    place = os.path.realpath(path)
    best, kind = "", ""
    for line in lines:
        _, mount, file_system, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, file_system
    return kind in _NETWORK_FILE_SYSTEMS
