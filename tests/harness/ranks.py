"""Real ranks for tests: one Gloo process group per world size, started once and shared by all tests that need it.

    results = ranks(2).run(function, argument, ...)     # function(argument, ...) on every rank; a list in rank order

`function` must be importable (module level). An exception on any rank fails the test with that rank's traceback, and
the group is started anew for the next test, for its ranks may have parted ways.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from runtime.process.garbage import collect_less_often, keep_all_objects
from tests.harness.waiting import patient

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "runtime.engine.initialize"])


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """`world_size` processes in one process group, waiting for functions to run."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="zerotop-ranks-")
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, rank, world_size, store), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.broken = False

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 90) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            ready = wait([p for r, p in enumerate(self._pipes) if r not in answers], patient(timeout_s))
            if not ready:
                self.broken = True
                missing = [r for r in range(self.world_size) if r not in answers]
                raise RankError(f"ranks {missing} gave no answer within {patient(timeout_s):g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self.broken = True
                    raise RankError(f"rank {rank} died") from None
                if not ok:
                    self.broken = True
                    raise RankError(f"rank {rank}:\n{value}")
                answers[rank] = value
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(0.1 if self.broken else patient(10))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    collect_less_often()
    keep_all_objects()
    os.environ["LOCAL_RANK"] = str(rank)
    tempfile.tempdir = str(Path(store).parent)  # a process of multiprocessing ends without removing its own
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(0)
            answer = (True, function(*arguments))
        except BaseException:
            text = io.StringIO()
            traceback.print_exc(file=text)
            answer = (False, text.getvalue())
        # By value: torch makes a tensor that multiprocessing pickles shared memory, and so an open file of the tests.
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
