"""The rank's handle on its writer process: sends jobs and pieces of streamed blocks, receives the outcome. Their
messages: protocol.py."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection as connections
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import reduction
from typing import Any

from runtime.checkpoint.saving.job import Job
from runtime.checkpoint.saving.priority import Priority
from runtime.checkpoint.saving.protocol import IGNORED
from runtime.checkpoint.saving.snapshot import SharedMemory, Snapshot

log = logging.getLogger("runtime.checkpoint")

PATIENCE_S = float(os.environ.get("ZEROTOP_WRITER_PATIENCE_S", "30"))
"""Seconds of silence after which a writer counts as hung: it is killed, and its checkpoint fails."""
START_PATIENCE_S = 300.0
"""Seconds of silence that are allowed while the writer starts."""
CLOSE_S = 2.0
"""Seconds that an idle writer gets to exit by itself."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended. problem: empty if the checkpoint is complete. notes: warnings. seconds: from copy to rename.
    blocked_s: seconds for which training waited."""

    job: Job
    problem: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    blocked_s: float = 0.0


@dataclass
class _Running:
    job: Job
    snapshot: Snapshot
    memory: SharedMemory
    on_done: Callable[[Outcome], None]
    blocked_s: float
    began_s: float = field(default_factory=time.monotonic)


class WriterProcess:
    """One rank's writer process. `save` returns at once; `wait` returns the outcome of the last save."""

    def __init__(self, address: str, rank: int, world_size: int, listener: socket.socket | None = None) -> None:
        """address, listener: where the writers of all ranks meet, see writer_group.py; on rank 0 the listening socket,
        which the process takes over. Raises OSError if the process cannot be started."""
        ours, theirs = socket.socketpair()
        inherited = [theirs.fileno(), *([listener.fileno()] if listener is not None else [])]
        command = [sys.executable, "-m", "runtime.checkpoint.saving.writer", str(theirs.fileno()), address]
        command += [str(rank), str(world_size), *map(str, inherited[1:])]
        # Blocked until the writer, after its imports, can ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                command, env={**os.environ, "PYTHONSAFEPATH": "1"}, stdin=subprocess.DEVNULL, pass_fds=inherited
            )
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            if listener is not None:
                listener.close()
        self._connection = connections.Connection(ours.detach())
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._running: _Running | None = None
        self._outcome: Outcome | None = None
        self._memory: SharedMemory | None = None
        self.alive = True
        """Whether it can take another job. False after any failure, as its peers may be gone: all ranks then start
        anew."""
        self._ready = False
        self._priority = Priority(self._process.pid)
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name="zerotop-checkpoint", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the writer."""
        return self._process.pid

    @property
    def busy(self) -> bool:
        """Whether a save is running."""
        return self._running is not None

    # ---- the training thread ---------------------------------------------------------------------------------------
    def save(
        self,
        job: Job,
        snapshot: Snapshot,
        memory: SharedMemory,
        on_done: Callable[[Outcome], None],
        blocked_s: float = 0.0,
    ) -> None:
        """Start writing `job` from `snapshot`. on_done: called with the outcome from another thread. blocked_s: seconds
        that training has waited so far."""
        with self._changed:
            assert self._running is None
            self._outcome = None
            running = self._running = _Running(job, snapshot, memory, on_done, blocked_s)
            lost = not self.alive
        if lost:
            self._end(_failed(job, "the writer process is gone"))
        else:
            self._outgoing.put(running)

    def wait(self, patience_s: float | None = None) -> Outcome | None:
        """Wait for the last save and return its outcome; None if there was none, or after `patience_s` seconds. The
        writer runs at normal priority meanwhile."""
        with self.hurried() if self.busy else contextlib.nullcontext(), self._changed:
            self._changed.wait_for(lambda: self._running is None, patience_s)
            return self._outcome

    def hurried(self) -> contextlib.AbstractContextManager[None]:
        """Run the writer at normal priority while training waits for it."""
        return self._priority.raised()

    def forget(self) -> None:
        """Drop the outcome of the last save, once it has been reported."""
        with self._changed:
            self._outcome = None

    def close(self) -> None:
        """End the process, even in the middle of a save. A second call does nothing."""
        self._outgoing.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not self.busy:
                self._process.wait(CLOSE_S)
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    # ---- two threads, so that neither sending nor receiving blocks the other -----------------------------------------
    def _send_all(self) -> None:
        while (item := self._outgoing.get()) is not None:
            try:
                if isinstance(item, _Running):
                    self._send_job(item)
                else:
                    self._connection.send(item)
            except (OSError, ValueError):
                return  # the writer is gone; the receiving thread reports it
            except Exception as error:  # the job can't be pickled
                if (running := self._running) is not None:
                    self._end(_failed(running.job, f"{type(error).__name__}: {error}"))
        with contextlib.suppress(OSError):
            self._connection.send(None)

    def _send_job(self, running: _Running) -> None:
        memory, snapshot = running.memory, running.snapshot
        if memory is not self._memory:
            self._connection.send(("memory", memory.nbytes))
            reduction.send_handle(self._connection, memory.descriptor, self.pid)  # type: ignore[arg-type]
            self._memory = memory
        snapshot.wait_copied()
        self._connection.send(("save", running.job, snapshot.places, snapshot.slots))

    def _receive_all(self) -> None:
        reason = "the writer process exited"
        try:
            while True:
                patience_s = PATIENCE_S if self._ready else START_PATIENCE_S
                if not (self._connection.poll(patience_s / 2) or self._heard_when_raised(patience_s / 2)):
                    reason = f"the writer process did not respond for {patience_s:g} s"
                    break
                self._received(self._connection.recv())
        except (EOFError, OSError):
            pass  # reported below
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._kill()
        self.alive = False
        if (running := self._running) is not None:
            self._end(_failed(running.job, f"{reason} (exit code {self._process.returncode})"))
        self._connection.close()

    def _heard_when_raised(self, patience_s: float) -> bool:
        """Whether a silent writer responds at normal priority: busy CPUs may have left it no time."""
        with self.hurried():
            return self._connection.poll(patience_s)

    def _received(self, message: Any) -> None:
        match message:
            case ("ready",):
                self._ready = True
                self._priority.lower()
            case ("copy_piece", index, slot):
                running = self._running
                assert running is not None
                running.snapshot.copy_piece(index, running.memory, slot)
                self._outgoing.put(("piece_ready", index))
            case ("done", problem, notes):
                self._end(problem, tuple(notes))

    def _end(self, problem: str, notes: tuple[str, ...] = ()) -> None:
        with self._changed:
            running = self._running
            if running is None:
                return
            running.snapshot.abandon()
            self.alive = self.alive and not problem
            outcome = Outcome(running.job, problem, notes, time.monotonic() - running.began_s, running.blocked_s)
        try:
            running.on_done(outcome)
        except Exception:
            log.exception("the on_done callback of a checkpoint failed")
        with self._changed:  # last: `wait` returns after on_done
            self._outcome, self._running = outcome, None
            self._changed.notify_all()


def _failed(job: Job, reason: str) -> str:
    return f"could not write {job.final}: {reason}"
