"""A writer process: `python -m runtime.checkpoint.saving.writer DESCRIPTOR ADDRESS RANK WORLD [LISTENER]`, started by a
rank (writer_handle.py). DESCRIPTOR and LISTENER are open files that it inherits.

The rank runs it at idle priority, so that training gets the CPU first (priority.py). It is a process rather than a
thread, so that training never waits for the GIL while the writer waits for the CPU. It does not import torch, so it
starts in a fraction of a second and takes little memory.
"""

from __future__ import annotations

import mmap
import multiprocessing.connection as connections
import os
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing import reduction
from typing import Any

from runtime.checkpoint.format.manifest import CheckpointError, root_cause
from runtime.checkpoint.saving.commit import write
from runtime.checkpoint.saving.job import Job, Place
from runtime.checkpoint.saving.protocol import ALIVE_S, IGNORED, PEER_LOST
from runtime.checkpoint.saving.writer_group import PeerLost, WriterGroup
from runtime.process.parent import die_with_parent


def main() -> None:
    """Serve the rank's jobs until it sends None or is gone."""
    descriptor, address, rank, world_size, *listeners = sys.argv[1:]
    die_with_parent(signal.SIGKILL)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    link = _Link(connections.Connection(int(descriptor)))
    listener = socket.socket(fileno=int(listeners[0])) if listeners else None
    try:
        group = WriterGroup(address, int(rank), int(world_size), listener)
    except (PeerLost, TimeoutError) as error:
        sys.exit(f"the writer process of rank {rank}: {error}")
    link.send(("ready",))
    threading.Thread(target=link.beat, daemon=True).start()
    pages: mmap.mmap | None = None
    while (message := link.receive()) is not None:
        match message:
            case ("memory", nbytes):
                handle = reduction.recv_handle(link.connection)  # type: ignore[arg-type]
                pages = mmap.mmap(handle, nbytes)
                os.close(handle)
            case ("save", job, places, slots):
                assert pages is not None
                link.send(("done", *_save(job, _Source(link, pages, places, slots), group)))


def _save(job: Job, source: _Source, group: WriterGroup) -> tuple[str, list[str]]:
    """Write the checkpoint. Returns (error, empty if it is complete; warnings)."""
    try:
        return "", write(job, source.read, group)
    except CheckpointError as error:
        return str(error), []
    except PeerLost:
        return f"could not write {job.final}: {PEER_LOST}", []
    except Exception as error:
        traceback.print_exception(error)
        return f"could not write {job.final}: {root_cause(error)}", []


class _Link:
    """The connection to the rank; the process exits when it breaks."""

    def __init__(self, connection: connections.Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message of protocol.py."""
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


class _Source:
    """Reads parts from shared memory; streamed pieces are requested from the rank, one ahead of use."""

    def __init__(self, link: _Link, pages: mmap.mmap, places: list[Place], slots: list[int]) -> None:
        """slots: byte offset of each in `pages`."""
        self._link, self._pages, self._places, self._slots = link, memoryview(pages), places, slots
        self._order = [index for index, place in enumerate(places) if place.at is None]
        self._turn = {index: turn for turn, index in enumerate(self._order)}
        self._requested = 0
        self._ready: set[int] = set()

    def read(self, index: int) -> memoryview:
        """The bytes of part `index`."""
        place = self._places[index]
        at = place.at if place.at is not None else self._slot(index)
        return self._pages[at : at + place.part.nbytes]

    def _slot(self, index: int) -> int:
        """Wait for a streamed piece and return its byte offset. The piece before it has been written, so its slot is
        free and the next piece is requested into it."""
        turn = self._turn[index]
        self._request_up_to(turn)
        while index not in self._ready:
            message = self._link.receive()
            assert message[0] == "piece_ready"
            self._ready.add(message[1])
        self._request_up_to(turn + 1)
        return self._slots[turn % len(self._slots)]

    def _request_up_to(self, turn: int) -> None:
        while self._requested <= min(turn, len(self._order) - 1):
            self._link.send(("copy_piece", self._order[self._requested], self._requested % len(self._slots)))
            self._requested += 1


if __name__ == "__main__":
    main()
