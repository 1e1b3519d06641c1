"""A writer process as its rank sees it: jobs go out, pieces of offloaded states are handed on, one word comes back.

rank                                             writer (python -m runtime.checkpoint.writer)
("memory", bytes) and a descriptor  ───────────▶  maps it
("save", job, places, ...)          ───────────▶  writes, together with the other ranks' writers
                                    ◀───────────  ("feed", index, slot)      the next piece of what stays
("fed", index)                      ───────────▶
                                    ◀───────────  ("alive",)                 every ALIVE_S
                                    ◀───────────  ("done", problem, notes)
"""

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

from runtime.checkpoint.job import Job
from runtime.checkpoint.snapshot import SharedMemory, Snapshot

log = logging.getLogger("runtime.checkpoint")

ALIVE_S = 2.0
PATIENCE_S = float(os.environ.get("ZEROTOP_WRITER_PATIENCE_S", "30"))
"""A writer that was silent for so long is stopped or stuck: it is ended, and its checkpoint given up."""
START_PATIENCE_S = 300.0
CLOSE_S = 2.0
MEETING_FOLDER = "zerotop-writers-"
"""What the name of a folder begins with in which writers meet, outside a run."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""By a writer: its rank decides when it ends. Batch systems and terminals send these to every process of a job."""
PEER_LOST = "another rank's writer process is gone"
"""What the other ranks' writers say of it: not the cause."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended. problem: empty when the checkpoint is complete. seconds: from copy to rename. blocked_s:
    for which training stood still."""

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
    """One rank's writer. `save` returns at once; `wait` returns the outcome of what was begun last."""

    def __init__(self, store: str, rank: int, world_size: int) -> None:
        """store: a file through which the writers of all ranks find each other. Raises OSError when none can be
        started."""
        ours, theirs = socket.socketpair()
        variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "runtime.checkpoint.writer", str(theirs.fileno()), store]
        # It ignores them as soon as it can, which is after its imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                [*command, str(rank), str(world_size)],
                env=variables,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._connection = connections.Connection(ours.detach())
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._running: _Running | None = None
        self._outcome: Outcome | None = None
        self._memory: SharedMemory | None = None
        self.alive = True
        """It can write. After a failure its peers may be gone: then all ranks start new ones."""
        self._ready = False
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name="zerotop-checkpoint", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def busy(self) -> bool:
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
        """Begin to write. on_done is called from another thread."""
        with self._changed:
            assert self._running is None
            self._outcome = None
            running = self._running = _Running(job, snapshot, memory, on_done, blocked_s)
            lost = not self.alive
        if lost:
            self._end(_failed(job, "its writer process is gone"))
        else:
            self._outgoing.put(running)

    def wait(self, patience_s: float | None = None) -> Outcome | None:
        """The outcome of the last save, when it is known; None when there was none, or after patience_s (seconds). The
        writer hurries meanwhile."""
        if self.busy:
            self._hurry()
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, patience_s)
            return self._outcome

    def forget(self) -> None:
        """Somebody knows the outcome."""
        with self._changed:
            self._outcome = None

    def close(self) -> None:
        """End the process, whatever it is doing. A second call does nothing."""
        self._outgoing.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not self.busy:
                self._process.wait(CLOSE_S)
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _hurry(self) -> None:
        """Somebody waits for it now: let it have the processor."""
        with contextlib.suppress(OSError):  # it is gone, or the system forbids it: then it takes longer
            for task in os.listdir(f"/proc/{self.pid}/task"):
                os.sched_setscheduler(int(task), os.SCHED_OTHER, os.sched_param(0))

    # ---- two threads: neither may hold up the other ----------------------------------------------------------------
    def _send_all(self) -> None:
        while (item := self._outgoing.get()) is not None:
            try:
                if isinstance(item, _Running):
                    self._send_job(item)
                else:
                    self._connection.send(item)
            except (OSError, ValueError):
                return  # it is gone: the other thread sees it too
            except Exception as error:  # the job can't be sent
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
        snapshot.copied()
        self._connection.send(("save", running.job, snapshot.places, snapshot.copied_bytes))

    def _receive_all(self) -> None:
        reason = "its writer process ended"
        try:
            while True:
                if not self._connection.poll(PATIENCE_S if self._ready else START_PATIENCE_S):
                    reason = "its writer process does not answer"
                    break
                self._received(self._connection.recv())
        except (EOFError, OSError):
            pass  # said below
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._kill()
        self.alive = False
        if (running := self._running) is not None:
            self._end(_failed(running.job, f"{reason} (exit code {self._process.returncode})"))
        self._connection.close()

    def _received(self, message: Any) -> None:
        match message:
            case ("ready",):
                self._ready = True
            case ("feed", index, slot):
                running = self._running
                assert running is not None
                running.snapshot.feed(index, running.memory, slot)
                self._outgoing.put(("fed", index))
            case ("done", problem, notes):
                self._end(problem, tuple(notes))

    def _end(self, problem: str, notes: tuple[str, ...] = ()) -> None:
        with self._changed:
            running = self._running
            if running is None:
                return
            running.snapshot.give_up()
            self.alive = self.alive and not problem
            outcome = Outcome(running.job, problem, notes, time.monotonic() - running.began_s, running.blocked_s)
        try:
            running.on_done(outcome)
        except Exception:
            log.exception("after a checkpoint")
        with self._changed:  # last: whoever waits finds everything said
            self._outcome, self._running = outcome, None
            self._changed.notify_all()


def _failed(job: Job, reason: str) -> str:
    return f"could not write {job.final}: {reason}"
