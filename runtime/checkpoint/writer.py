"""A writer process: `python -m runtime.checkpoint.writer DESCRIPTOR STORE RANK WORLD`, started by a rank (process.py).

It runs at idle priority, so that training has the processor whenever it wants it; it is a process and not a thread, so
that training never waits for Python's lock while the writer waits for the processor.
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import multiprocessing.connection as connections
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing import reduction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.format.manifest import CheckpointError, root_cause
from runtime.checkpoint.writer_process import ALIVE_S, IGNORED, MEETING_FOLDER, PEER_LOST
from runtime.plan.constants import SNAPSHOT_SLOTS
from runtime.telemetry.orphan import die_with_parent

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.job import Job
    from runtime.checkpoint.snapshot import Place

MEETING_S = 120.0
WRITING_S = 12 * 3600.0
"""A rank's writer may wait so long for another's: disks can be slow."""


def main() -> None:
    descriptor, store, rank, world_size = sys.argv[1:]
    die_with_parent(signal.SIGKILL)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    link = _Link(connections.Connection(int(descriptor)))
    peers = _Peers(store, int(rank), int(world_size))
    link.send(("ready",))
    _be_idle()  # threads that start later are, too
    threading.Thread(target=link.beat, daemon=True).start()
    pages: mmap.mmap | None = None
    while (message := link.receive()) is not None:
        match message:
            case ("memory", nbytes):
                from runtime.checkpoint.snapshot import map_shared

                handle = reduction.recv_handle(link.connection)  # type: ignore[arg-type]
                pages = map_shared(handle, nbytes)
                os.close(handle)
            case ("save", job, places, copied_bytes):
                assert pages is not None
                link.send(("done", *_save(job, _Source(link, pages, places, copied_bytes), peers)))
                _be_idle()  # the rank may have lent it the processor
    os._exit(0)  # without the ends of groups and stores, which look for each other


def _save(job: Job, source: _Source, peers: _Peers) -> tuple[str, list[str]]:
    """What went wrong: with the checkpoint, and afterwards."""
    from runtime.checkpoint.commit import write

    try:
        return "", write(job, source.read, peers)
    except CheckpointError as error:
        return str(error), []
    except Exception as error:
        return f"could not write {job.final}: {_in_words(error)}", []


def _in_words(error: Exception) -> str:
    from runtime.comm.pending import GLOO_DISCONNECTED

    text = root_cause(error)
    if any(words in text.lower() for words in GLOO_DISCONNECTED):
        return PEER_LOST
    traceback.print_exception(error)
    return text


class _Link:
    """The way to the rank. Without it there is nothing to do here."""

    def __init__(self, connection: connections.Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        try:
            with self._lock:
                self.connection.send(message)
        except OSError:
            os._exit(1)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    def beat(self) -> None:
        while True:
            self.send(("alive",))
            time.sleep(ALIVE_S)


class _Peers:
    """The writers of all ranks, over Gloo, as runtime.checkpoint.commit wants them."""

    def __init__(self, store: str, rank: int, world_size: int) -> None:
        import torch.distributed as dist

        self.rank, self.world_size = rank, world_size
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=MEETING_S),
        )
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=WRITING_S))
        self.gather_objects(None)  # from here on nobody looks at the file
        if rank == 0:
            _remove(Path(store))

    def broadcast_object(self, value: Any) -> Any:
        from runtime.comm import objects

        return objects.broadcast(value, self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        from runtime.comm import objects

        return objects.gather(value, self.group)


class _Source:
    """The elements of each part: in shared memory, or asked for, the next one always ahead."""

    def __init__(self, link: _Link, pages: mmap.mmap, places: list[Place], copied_bytes: int) -> None:
        self._link, self._pages, self._places, self._copied_bytes = link, pages, places, copied_bytes
        self._order = [index for index, place in enumerate(places) if place.at is None]
        self._turn = {index: turn for turn, index in enumerate(self._order)}
        self._asked = 0
        self._fed: set[int] = set()

    def read(self, index: int) -> torch.Tensor:
        import torch

        place = self._places[index]
        at = place.at if place.at is not None else self._slot(index)
        return torch.frombuffer(self._pages, dtype=place.part.dtype, count=place.part.numel, offset=at)

    def _slot(self, index: int) -> int:
        """Where a piece is that was asked for. The one before it has been written: its slot is free for the next."""
        from runtime.checkpoint.snapshot import slot_at

        turn = self._turn[index]
        self._ask_up_to(turn)
        while index not in self._fed:
            message = self._link.receive()
            assert message[0] == "fed"
            self._fed.add(message[1])
        self._ask_up_to(turn + 1)
        return slot_at(self._copied_bytes, turn % SNAPSHOT_SLOTS)

    def _ask_up_to(self, turn: int) -> None:
        while self._asked <= min(turn, len(self._order) - 1):
            self._link.send(("feed", self._order[self._asked], self._asked % SNAPSHOT_SLOTS))
            self._asked += 1


def _remove(store: Path) -> None:
    """The file through which the writers have met, and its folder where it was made for that."""
    store.unlink(missing_ok=True)
    if store.parent.name.startswith(MEETING_FOLDER):
        store.parent.rmdir()


def _be_idle() -> None:
    """Use only what training leaves, where the system has such a thing (Linux)."""
    import psutil

    with contextlib.suppress(OSError, AttributeError, psutil.Error):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


if __name__ == "__main__":
    main()
