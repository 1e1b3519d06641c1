"""A writer process: `python -m runtime.checkpoint.saving.writer DESCRIPTOR STORE RANK WORLD`, started by a rank
(writer_handle.py).

The rank runs it at idle priority, so that training gets the CPU first (priority.py). It is a process rather than a
thread, so that training never waits for the GIL while the writer waits for the CPU.
"""

from __future__ import annotations

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
from runtime.checkpoint.saving.writer_handle import ALIVE_S, IGNORED, MEETING_FOLDER, PEER_LOST
from runtime.plan.constants import SNAPSHOT_SLOTS
from runtime.telemetry.orphan import die_with_parent

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.saving.job import Job
    from runtime.checkpoint.saving.snapshot import Place

MEETING_S = 120.0
"""Timeout for the writers of all ranks to find each other."""
WRITING_S = 12 * 3600.0
"""Timeout of collectives among writers, which includes the time that the slowest disk takes."""


def main() -> None:
    """Serve the rank's jobs until it sends None or is gone."""
    descriptor, store, rank, world_size = sys.argv[1:]
    die_with_parent(signal.SIGKILL)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    link = _Link(connections.Connection(int(descriptor)))
    peers = _Peers(store, int(rank), int(world_size))
    link.send(("ready",))
    threading.Thread(target=link.beat, daemon=True).start()
    pages: mmap.mmap | None = None
    while (message := link.receive()) is not None:
        match message:
            case ("memory", nbytes):
                from runtime.checkpoint.saving.snapshot import map_shared

                handle = reduction.recv_handle(link.connection)  # type: ignore[arg-type]
                pages = map_shared(handle, nbytes)
                os.close(handle)
            case ("save", job, places, copied_bytes):
                assert pages is not None
                link.send(("done", *_save(job, _Source(link, pages, places, copied_bytes), peers)))
    os._exit(0)  # skips the teardown of process groups and stores, which would wait for peers


def _save(job: Job, source: _Source, peers: _Peers) -> tuple[str, list[str]]:
    """Write the checkpoint. Returns (error, empty if it is complete; warnings)."""
    from runtime.checkpoint.saving.commit import write

    try:
        return "", write(job, source.read, peers)
    except CheckpointError as error:
        return str(error), []
    except Exception as error:
        return f"could not write {job.final}: {_describe(error)}", []


def _describe(error: Exception) -> str:
    from runtime.comm.pending import GLOO_DISCONNECTED

    text = root_cause(error)
    if any(words in text.lower() for words in GLOO_DISCONNECTED):
        return PEER_LOST
    traceback.print_exception(error)
    return text


class _Link:
    """The connection to the rank; the process exits when it breaks."""

    def __init__(self, connection: connections.Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message of the protocol in writer_handle.py."""
        try:
            with self._lock:
                self.connection.send(message)
        except OSError:
            os._exit(1)

    def receive(self) -> Any:
        """The next message; None when the rank closes the writer."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    def beat(self) -> None:
        """Send ("alive",) every ALIVE_S seconds, for ever."""
        while True:
            self.send(("alive",))
            time.sleep(ALIVE_S)


class _Peers:
    """The `Peers` of commit.py: the writers of all ranks, over Gloo."""

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
        self.gather_objects(None)  # from here on no writer needs the file
        if rank == 0:
            _remove(Path(store))

    def broadcast_object(self, value: Any) -> Any:
        from runtime.comm import objects

        return objects.broadcast(value, self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        from runtime.comm import objects

        return objects.gather(value, self.group)


class _Source:
    """Reads parts from shared memory; streamed pieces are requested from the rank, one ahead of use."""

    def __init__(self, link: _Link, pages: mmap.mmap, places: list[Place], copied_bytes: int) -> None:
        self._link, self._pages, self._places, self._copied_bytes = link, pages, places, copied_bytes
        self._order = [index for index, place in enumerate(places) if place.at is None]
        self._turn = {index: turn for turn, index in enumerate(self._order)}
        self._requested = 0
        self._ready: set[int] = set()

    def read(self, index: int) -> torch.Tensor:
        """(numel,): the elements of part `index`."""
        import torch

        place = self._places[index]
        at = place.at if place.at is not None else self._slot(index)
        return torch.frombuffer(self._pages, dtype=place.part.dtype, count=place.part.numel, offset=at)

    def _slot(self, index: int) -> int:
        """Wait for a streamed piece and return its byte offset. The piece before it has been written, so its slot is
        free and the next piece is requested into it."""
        from runtime.checkpoint.saving.snapshot import slot_at

        turn = self._turn[index]
        self._request_up_to(turn)
        while index not in self._ready:
            message = self._link.receive()
            assert message[0] == "piece_ready"
            self._ready.add(message[1])
        self._request_up_to(turn + 1)
        return slot_at(self._copied_bytes, turn % SNAPSHOT_SLOTS)

    def _request_up_to(self, turn: int) -> None:
        while self._requested <= min(turn, len(self._order) - 1):
            self._link.send(("copy_piece", self._order[self._requested], self._requested % SNAPSHOT_SLOTS))
            self._requested += 1


def _remove(store: Path) -> None:
    """Delete the FileStore's file, and its folder if it was created for it."""
    store.unlink(missing_ok=True)
    if store.parent.name.startswith(MEETING_FOLDER):
        store.parent.rmdir()


if __name__ == "__main__":
    main()
