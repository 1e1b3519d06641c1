"""The recording: what the hub heard, in RUN/recording.sqlite. A thread of its own writes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.wire.codec import ProtocolError, decode_up, encode
from runtime.wire.messages import Collectives, Heartbeat, Memory, Message, NodeStats, Phases, StepResult

COMMIT_S = 1.0
DENSE_S = 3600.0
"""Sampled kinds are kept once a second for so long, later once per elapsed/DENSE_S seconds: a week costs six times an
hour."""
_SAMPLED = (StepResult, Memory, Heartbeat, NodeStats, Collectives, Phases)
_NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb2 smb3 smbfs lustre gpfs beegfs beegfs_nodev ceph fuse.ceph fuse.sshfs "  # noqa: SIM905
    "fuse.glusterfs glusterfs afs 9p pvfs2 orangefs wekafs panfs virtiofs".split()
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages(
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, wall_s REAL NOT NULL, source TEXT NOT NULL, kind TEXT NOT NULL,
    body BLOB NOT NULL)
"""


_INSERT = "INSERT INTO messages(attempt, wall_s, source, kind, body) VALUES (?, ?, ?, ?, ?)"
_EARLIER = "FROM messages WHERE kind = 'step' AND source = 'rank/0' AND attempt < ?"
_SELECT = "SELECT attempt, wall_s, source, body FROM messages ORDER BY id"


class Recorded(NamedTuple):
    """One row of a recording; `wall_s` is when the hub heard it."""

    attempt: int
    wall_s: float
    source: str
    message: Message


class Recorder:
    """Writes until `close`. When the disk is full or gone, `error` says so, recording ends, and the run goes on."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.error: str = ""
        self._path = path
        self._attempt = attempt
        self._start = time.monotonic()
        self._last: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], Message] = {}
        self._rows: list[tuple[int, float, str, str, bytes]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._thread = threading.Thread(target=self._write_until_closed, name="recorder", daemon=True)
        self._thread.start()

    def add(self, source: str, message: Message) -> None:
        """Keep `message`, unless it is of a sampled kind and one like it was just kept. Never blocks on the disk."""
        if not self.error and self._wanted(source, message):
            self._append(source, message)

    def _append(self, source: str, message: Message) -> None:
        row = (self._attempt, time.time(), source, str(getattr(message, "kind", "")), encode(message))
        with self._lock:
            self._rows.append(row)

    def begin_attempt(self, attempt: int) -> None:
        """Rows from here on are of `attempt`; the one before ends with the newest of each sampled kind."""
        self._let_go()
        self._last.clear()
        self._attempt = attempt

    def close(self) -> None:
        """Write what is left, and the newest of each sampled kind, so that the recording ends where the run did.

        Bounded: a disk that doesn't answer is left alone after some seconds.
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
        if isinstance(message, StepResult) and message.rank == 0:
            return True
        now = time.monotonic()
        interval_s = max(1.0, (now - self._start) / DENSE_S)
        key = (source, message.kind)
        # A tenth of slack: a 1 Hz source must not lose every second sample to jitter.
        if now - self._last.get(key, -interval_s) < 0.9 * interval_s:
            self._held[key] = message
            return False
        self._last[key] = now
        self._held.pop(key, None)
        return True

    def _write_until_closed(self) -> None:
        try:
            database = sqlite3.connect(self._path, timeout=5)
            try:
                journal = "TRUNCATE" if on_network_file_system(self._path) else "WAL"
                database.execute(f"PRAGMA journal_mode={journal}")
                database.execute("PRAGMA synchronous=NORMAL")
                database.execute(_SCHEMA)
                database.commit()
                while not self._closing.wait(COMMIT_S):
                    self._flush(database)
                self._flush(database)
            finally:
                database.close()
        except sqlite3.Error as error:
            self.error = f"the recording ends here: {error}"
            with self._lock:
                self._rows.clear()

    def _flush(self, database: sqlite3.Connection) -> None:
        with self._lock:
            rows, self._rows = self._rows, []
        if rows:
            with database:
                database.executemany(_INSERT, rows)


def read_recording(run: Path) -> Iterator[Recorded]:
    """Rows of RUN/recording.sqlite, oldest first, of all attempts. Nothing for a run without a recording.

    Works while the run is being recorded. Kinds that this version doesn't know are skipped. Raises sqlite3.Error for a
    damaged file.
    """
    path = run / "recording.sqlite"
    if not path.exists():
        return
    database = sqlite3.connect(f"file:{_quote(path)}?mode=ro", uri=True, timeout=5)
    try:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'messages'").fetchone():
            return  # the recorder has only just made the file
        for attempt, wall_s, source, body in database.execute(_SELECT):
            message = decode_up(body)
            if message is not None:
                yield Recorded(attempt, wall_s, source, message)
    finally:
        database.close()


def read_messages(run: Path) -> Iterator[Message]:
    """What a RunState folds to be where the recording ends."""
    for row in read_recording(run):
        yield row.message


def earlier_steps(run: Path, attempt: int, limit: int = 1000) -> list[StepResult]:
    """Rank 0's steps of the attempts before `attempt`, evenly thinned to at most about `limit`: a resumed run's
    history.

    Empty when there is none, or the recording is damaged.
    """
    path = run / "recording.sqlite"
    if attempt <= 1 or not path.exists():
        return []
    try:
        database = sqlite3.connect(f"file:{_quote(path)}?mode=ro", uri=True, timeout=5)
        try:
            (count,) = database.execute(f"SELECT count(*) {_EARLIER}", (attempt,)).fetchone()
            stride = max(1, -(-count // limit))
            rows = database.execute(f"SELECT body {_EARLIER} ORDER BY id", (attempt,))
            steps = [decode_up(body) for index, (body,) in enumerate(rows) if (count - 1 - index) % stride == 0]
        finally:
            database.close()
    except (sqlite3.Error, ProtocolError):
        return []
    return [step for step in steps if isinstance(step, StepResult)]


def on_network_file_system(path: Path) -> bool:
    """Whether SQLite's shared-memory log (WAL) can't be used where `path` lies. False where the system does not tell
    (not Linux)."""
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


def _quote(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
