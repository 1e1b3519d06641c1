"""Saving beside training: a copy while training waits, the rest in a writer process."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint import folder as folders
from runtime.checkpoint.buffers import owners_of
from runtime.checkpoint.common import described, merged, own_files, own_scalars
from runtime.checkpoint.manifest import CheckpointError
from runtime.checkpoint.parts import Block, blocks_of
from runtime.checkpoint.process import MEETING_FOLDER, PEER_LOST, Outcome, WriterProcess
from runtime.checkpoint.saving import EVERYTHING, Options, make_job
from runtime.checkpoint.snapshot import SharedMemory, Snapshot
from runtime.host.memory_limits import HostMemoryError, check_host_memory
from runtime.process.forked import Owner, at_exit
from runtime.wire.sizes import format_size

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.zero.flat import Flat

LEAVE_S = 60.0
"""What was begun by an engine that a script has dropped gets so long."""
log = logging.getLogger("runtime.checkpoint")


_open: weakref.WeakSet[Background] = weakref.WeakSet()
"""Those with a writer process."""


def leave_all(patience_s: float | None = None) -> None:
    """This process ends: see `Background.leave`."""
    for background in list(_open):
        background.leave(patience_s)


class Background:
    """Of one engine. Made at once; the writer process comes with `prepare` or the first save."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._process = Owner()
        self._writer: WriterProcess | None = None
        self._generation = 0
        self._memory: SharedMemory | None = None
        self._touching: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._prepared = False
        self._tells = False
        """The last save has an on_done."""
        self._untold = ""
        """What went wrong with a save that has none, until it is raised."""
        self._bounded = False
        """The host has no room for a copy of everything."""

    @property
    def busy(self) -> bool:
        """This rank's writer has something to write."""
        return self._writer is not None and self._writer.busy

    # ---- all ranks at the same step --------------------------------------------------------------------------------
    def begin(
        self,
        folder: Path,
        tag: str,
        client_state: dict[str, Any],
        on_done: Callable[[Outcome], None] | None = None,
        *,
        options: Options = EVERYTHING,
        keep: int = 0,
        keep_every: int = 0,
    ) -> Path:
        """Copy this moment and let the writers have it. Returns the path that the checkpoint will have. on_done is
        called from another thread, on every rank.

        Raises CheckpointError on every rank when it can't begin on any; then nothing has been written. An earlier save
        is waited for; without on_done, the failure of one that had none either is raised here.
        """
        engine, began = self._owner(), time.monotonic()
        engine.synchronize()
        failed = self._untold_problem()
        owners = owners_of(engine)
        blocks = blocks_of(engine, owners, options.with_frozen)
        problem = self._lacks_disk(folder, blocks)
        snapshot, no_memory = self._make_ready(blocks)
        problem = problem or no_memory
        alive = self._writer is not None and self._writer.alive
        scalars = own_scalars(engine)
        told = engine.comm.gather_objects((problem, failed, alive, self._generation, scalars))
        if on_done is None and (earlier := _cause(failed for _, failed, *_ in told)):
            raise CheckpointError(earlier)
        self._untold = failed  # for whoever can raise it
        problems = [(rank, found) for rank, (found, *_) in enumerate(told) if found]
        if problems:
            raise CheckpointError(f"could not write {folder / tag}: rank {problems[0][0]}: {problems[0][1]}")
        if not all(lives for _, _, lives, *_ in told):
            self._start_anew(1 + max(generation for *_, generation, _ in told))
        assert self._memory is not None and self._writer is not None
        snapshot.copy(self._memory)
        parts = [place.part for place in snapshot.places]
        all_scalars = merged([rules for *_, rules in told])
        job = make_job(
            engine, folder, tag, parts, all_scalars, client_state, owners, options, keep=keep, keep_every=keep_every
        )
        self._snapshot, self._tells = snapshot, on_done is not None
        self._writer.save(job, snapshot, self._memory, on_done or (lambda outcome: None), time.monotonic() - began)
        return job.final

    def settle(self) -> str:
        """Wait for the last save. Returns what went wrong with it on any rank, once; empty when nothing did."""
        return _cause(self._owner().comm.gather_objects(self._outcome_of_last()))

    def settle_untold(self) -> str:
        """Wait for the last save. Returns what went wrong, on any rank, with a save that has no on_done; once."""
        return _cause(self._owner().comm.gather_objects(self._untold_problem()))

    # ---- this rank -------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Start what the first save needs, so that it is as fast as the later ones. No collective."""
        if self._prepared or self._store_of_run() is None:
            return
        self._prepared, engine = True, self._owner()
        if self._writer is not None:
            return
        _, problem = self._make_ready(blocks_of(engine, owners=None), ahead=True)
        own_files(engine)  # torch imports what it saves with at the first call
        if engine.comm.rank == 0:
            described(engine)
        if not problem:
            self._start_anew(1)

    def wait_briefly(self, patience_s: float) -> bool:
        """Wait at most so many seconds for what is being written. Returns whether it is done."""
        assert self._writer is not None
        with self._owner().telemetry.span("checkpoint"):
            self._writer.wait(patience_s)
        return not self.busy

    def before_update(self, flat: Flat) -> None:
        """Returns when `flat` may change."""
        if self._snapshot is not None:
            self._snapshot.wait_for(flat)

    def before_change(self) -> None:
        """Returns when everything may change."""
        if self._snapshot is not None:
            self._snapshot.wait_for_all()

    def leave(self, patience_s: float | None = None) -> None:
        """This process ends: wait for what is being written (seconds; None: as long as it takes), then end the
        writer. A forked child leaves them to the rank."""
        if not self._process.is_here:
            return
        if self._writer is not None:
            self._writer.wait(patience_s)
        self.close()

    def close(self) -> None:
        """End the writer and give its memory back. A second call does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._snapshot = None
        self._drop_memory()

    def __del__(self) -> None:
        if self._writer is not None or self._memory is not None:
            self.leave(LEAVE_S)

    # ---- inside ----------------------------------------------------------------------------------------------------
    def _owner(self) -> Engine:
        engine = self._engine()
        assert engine is not None
        return engine

    def _outcome_of_last(self) -> str:
        """Wait for the last save. Returns what went wrong with it on this rank, once."""
        if self._writer is None:
            return ""
        with self._owner().telemetry.span("checkpoint") if self._writer.busy else contextlib.nullcontext():
            outcome = self._writer.wait()
        self._writer.forget()
        problem = outcome.problem if outcome is not None else ""
        if not self._tells:
            self._untold = self._untold or problem
        return problem

    def _untold_problem(self) -> str:
        """The same, of the last save that has no on_done, also when others followed."""
        self._outcome_of_last()
        untold, self._untold = self._untold, ""
        return untold

    def _lacks_disk(self, folder: Path, blocks: list[Block]) -> str:
        """Rank 0 looks. Returns what is in the way."""
        comm = self._owner().comm
        if comm.rank != 0:
            return ""
        folders.sweep(folder)  # what a killed run left there takes space
        mine = sum(part.nbytes for block in blocks if not block.alike for _, part in block.parts)
        alike = sum(part.nbytes for block in blocks if block.alike for _, part in block.parts)
        return folders.missing_space(folder, mine * comm.world_size + alike)

    def _make_ready(self, blocks: list[Block], ahead: bool = False) -> tuple[Snapshot, str]:
        """A snapshot to be taken, and memory for it. Also says what is in the way. ahead: the memory's pages are
        taken meanwhile."""
        engine = self._owner()
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        snapshot = Snapshot(blocks, self._bounded)
        if self._memory is not None and self._memory.nbytes >= snapshot.nbytes:
            return snapshot, ""
        self._drop_memory()
        on_gpu = engine.device.type == "cuda"
        if not self._bounded and not self._has_room(snapshot.nbytes, on_gpu):
            self._bounded = True
            snapshot = Snapshot(blocks, bounded=True)
        try:
            memory = SharedMemory(snapshot.nbytes, engine.device if on_gpu else None)
        except (OSError, MemoryError, RuntimeError) as error:
            return snapshot, f"no memory for a copy of {snapshot.nbytes:,} bytes: {error}"
        self._memory = memory
        engine.ledger.add("snapshot", memory.nbytes, offloaded=True)
        if ahead:
            self._touching = threading.Thread(target=memory.touch, daemon=True)
            self._touching.start()
        return snapshot, ""

    def _has_room(self, nbytes: int, pin: bool) -> bool:
        """Whether this host has memory for the copies of all its ranks. A copy that is too large would end in the OOM
        killer's hands."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            check_host_memory(nbytes, pin=pin, local_world=ranks)
        except HostMemoryError:
            log.warning(
                f"this host has no room for {ranks} copies of {format_size(nbytes)}: checkpoints are read piece by "
                "piece from where the states are, and the next step may wait for the disk"
            )
            return False
        return True

    def _drop_memory(self) -> None:
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        memory, self._memory = self._memory, None
        if memory is not None:
            if (engine := self._engine()) is not None:
                engine.ledger.add("snapshot", -memory.nbytes, offloaded=True)
            memory.close()

    def _start_anew(self, generation: int) -> None:
        """A writer of the generation that the other ranks' belong to."""
        comm = self._owner().comm
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._generation = generation
        store = self._store_of_run()
        if store is None:  # the writers remove it when they have met
            made = tempfile.mkdtemp(prefix=MEETING_FOLDER) if comm.rank == 0 else None
            store = Path(comm.broadcast_object(made))
        session = self._owner().session
        meeting = store / f"writers-{session.attempt}-{session.number}-{generation}"
        if not _open:
            at_exit(leave_all)
        _open.add(self)
        self._writer = WriterProcess(str(meeting), comm.rank, comm.world_size)

    def _store_of_run(self) -> Path | None:
        run = self._owner().session.run
        return Path(run.sockets) if run is not None else None


def _cause(problems: Iterable[str]) -> str:
    """Of what the ranks say of one save, that which is not the others' consequence; empty when it went well."""
    return min(filter(None, problems), key=lambda problem: problem.endswith(PEER_LOST), default="")
