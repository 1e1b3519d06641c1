"""`Checkpointer`: saves and loads the training state of one engine.

save     training waits while the ranks write for themselves
begin    training waits for a copy; a writer process per rank writes it, while training goes on
load     continue from a checkpoint of any world size, stage and unit cut
"""

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
from typing import Any

from runtime.checkpoint.buffers import Owners, owners_of
from runtime.checkpoint.capture import Block, Part, blocks_of
from runtime.checkpoint.common import Scalars, common_file, manifest_of, merged, own_files, own_scalars
from runtime.checkpoint.describe import describe_model
from runtime.checkpoint.format import folder as folders
from runtime.checkpoint.format.manifest import EVERYTHING, MODEL_FILES, CheckpointError, Damaged, Wanted
from runtime.checkpoint.job import DEFAULTS, Job, Options
from runtime.checkpoint.registered import ScriptState
from runtime.checkpoint.snapshot import SharedMemory, Snapshot, SnapshotGuard
from runtime.checkpoint.writer_process import MEETING_FOLDER, PEER_LOST, Outcome, WriterProcess
from runtime.host.memory_limits import HostMemoryError, check_host_memory
from runtime.process.forked import Owner, at_exit
from runtime.state.train_state import TrainState
from runtime.wire.rundir import RunFile
from runtime.wire.sizes import format_size

LEAVE_S = 60.0
"""How long a save may take that was begun by an engine that a script has dropped."""
log = logging.getLogger("runtime.checkpoint")

_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()
"""Those with a writer process."""


def leave_all(patience_s: float | None = None) -> None:
    """This process ends: see `Checkpointer.leave`."""
    for checkpointer in list(_open):
        checkpointer.leave(patience_s)


class Checkpointer:
    """Made at once; the writer process comes with `prepare` or the first `begin`."""

    def __init__(
        self,
        state: TrainState,
        script: ScriptState,
        guard: SnapshotGuard,
        run: RunFile | None,
        attempt: int = 1,
        engine_number: int = 1,
    ) -> None:
        """run: of which this process is a rank; None: of none. attempt and engine_number keep the writers of different
        attempts and engines apart."""
        self._state, self._script, self._guard, self._run = state, script, guard, run
        self._meeting = f"writers-{attempt}-{engine_number}"
        self._process = Owner()
        self._writer: WriterProcess | None = None
        self._generation = 0
        self._memory: SharedMemory | None = None
        self._touching: threading.Thread | None = None
        self._prepared = False
        self._reports = False
        """The last save has an on_done."""
        self._unreported = ""
        """What went wrong with a save that has none, until it is raised."""
        self._bounded = False
        """The host has no room for a copy of everything."""
        self._model_files: dict[str, bytes] | None = None

    @property
    def busy(self) -> bool:
        """This rank's writer has something to write."""
        return self._writer is not None and self._writer.busy

    # ---- all ranks at the same step --------------------------------------------------------------------------------
    def save(self, folder: Path, tag: str, client_state: dict[str, Any], options: Options = DEFAULTS) -> Path:
        """Write FOLDER/TAG. Returns the complete checkpoint's path. Collective.

        Raises CheckpointError on every rank when any rank could not write; nothing of it remains then.
        """
        # torch.distributed.checkpoint takes 48 MiB: a rank whose writer process writes never imports it.
        from runtime.checkpoint.commit import write

        state = self._state
        state.synchronize()
        owners = owners_of(state)
        blocks = blocks_of(state, owners, options.with_frozen)
        views = [(part, block.view(at, part)) for block in blocks for at, part in block.parts]
        scalars = merged(state.comm.gather_objects(own_scalars(state)))
        job = self._job(folder, tag, [part for part, _ in views], scalars, client_state, owners, options)
        write(job, lambda index: views[index][1], state.comm)
        return job.final

    def begin(
        self,
        folder: Path,
        tag: str,
        client_state: dict[str, Any],
        on_done: Callable[[Outcome], None] | None = None,
        *,
        options: Options = DEFAULTS,
        keep: int = 0,
        keep_every: int = 0,
    ) -> Path:
        """Copy this moment and let the writers have it. Returns the path that the checkpoint will have. on_done is
        called from another thread, on every rank. Collective.

        Raises CheckpointError on every rank when it can't begin on any; then nothing has been written. An earlier save
        is waited for; without on_done, the failure of one that had none either is raised here.
        """
        state, began = self._state, time.monotonic()
        state.synchronize()
        failed = self._unreported_problem()
        owners = owners_of(state)
        blocks = blocks_of(state, owners, options.with_frozen)
        problem = self._lacks_disk(folder, blocks)
        snapshot, no_memory = self._make_ready(blocks)
        problem = problem or no_memory
        alive = self._writer is not None and self._writer.alive
        scalars = own_scalars(state)
        told = state.comm.gather_objects((problem, failed, alive, self._generation, scalars))
        if on_done is None and (earlier := _cause(failed for _, failed, *_ in told)):
            raise CheckpointError(earlier)
        self._unreported = failed  # for whoever can raise it
        problems = [(rank, found) for rank, (found, *_) in enumerate(told) if found]
        if problems:
            raise CheckpointError(f"could not write {folder / tag}: rank {problems[0][0]}: {problems[0][1]}")
        if not all(lives for _, _, lives, *_ in told):
            self._start_anew(1 + max(generation for *_, generation, _ in told))
        assert self._memory is not None and self._writer is not None
        snapshot.copy(self._memory)
        parts = [place.part for place in snapshot.places]
        all_scalars = merged([each for *_, each in told])
        job = self._job(
            folder, tag, parts, all_scalars, client_state, owners, options, keep=keep, keep_every=keep_every
        )
        self._guard.hold(snapshot)
        self._reports = on_done is not None
        self._writer.save(job, snapshot, self._memory, on_done or (lambda outcome: None), time.monotonic() - began)
        return job.final

    def settle(self) -> str:
        """Wait for the last save. Returns what went wrong with it on any rank, once; empty when nothing did.
        Collective."""
        return _cause(self._state.comm.gather_objects(self._outcome_of_last()))

    def settle_unreported(self) -> str:
        """Wait for the last save. Returns what went wrong, on any rank, with a save that has no on_done; once.
        Collective."""
        return _cause(self._state.comm.gather_objects(self._unreported_problem()))

    def load(self, path: Path, wanted: Wanted = EVERYTHING) -> None:
        """Continue from the checkpoint at `path`; objects that are registered later get their states then. Collective.

        Raises CheckpointError on every rank, before anything is changed, when it does not fit.
        """
        from runtime.checkpoint.load import load

        loaded = load(self._state, self._script.registered, self._guard, path, wanted)
        self._script.client_state = loaded.client_state
        self._script.last_checkpoint = path
        if wanted.progress:
            self._state.discard_accumulated()
        self._script.registered.restore(loaded.registered, loaded.generators)

    def load_newest(
        self, folder: Path, wanted: Wanted = EVERYTHING, tell: Callable[[str], None] = log.error
    ) -> Path | None:
        """Load the newest complete checkpoint in `folder` that is sound; None when there is none. tell: hears, on rank
        0, which ones are damaged and passed over. Collective."""
        comm = self._state.comm
        found = [entry.path.name for entry in folders.complete(folder) if entry.latest]
        for path in (folder / name for name in reversed(comm.broadcast_object(found))):
            try:
                self.load(path, wanted)
            except Damaged as error:
                if comm.rank == 0:
                    tell(f"{error}: the one before it is taken")
                continue
            return path
        return None

    # ---- this rank -------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Start what the first `begin` needs, so that it is as fast as the later ones. No collective."""
        if self._prepared or self._run is None:
            return
        self._prepared, state = True, self._state
        if self._writer is not None:
            return
        _, problem = self._make_ready(blocks_of(state, owners=None), ahead=True)
        own_files(state.comm.rank, self._script.registered.generators)  # torch imports what it saves with at first
        if state.comm.rank == 0:
            self._described()
        if not problem:
            self._start_anew(1)

    def wait_briefly(self, patience_s: float) -> bool:
        """Wait at most so many seconds for what is being written. Returns whether it is done."""
        assert self._writer is not None
        with self._state.comm.telemetry.span("checkpoint"):
            self._writer.wait(patience_s)
        return not self.busy

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
        self._guard.hold(None)
        self._drop_memory()

    def __del__(self) -> None:
        if self._writer is not None or self._memory is not None:
            self.leave(LEAVE_S)

    # ---- inside ----------------------------------------------------------------------------------------------------
    def _job(
        self,
        folder: Path,
        tag: str,
        parts: list[Part],
        scalars: Scalars,
        client_state: dict[str, Any],
        owners: Owners,
        options: Options,
        **more: Any,
    ) -> Job:
        """This rank's part of a checkpoint of this moment, without the tensors. What can't be saved is the job's
        problem."""
        state, registered = self._state, self._script.registered
        files = own_files(state.comm.rank, registered.generators)
        if state.comm.rank != 0:
            return Job(folder, tag, parts, files, **more)
        manifest = manifest_of(state, owners, options.with_frozen)
        manifest = manifest.model_copy(update={"saved_wall_s": time.time(), "latest": options.latest})
        try:
            files |= common_file(state, scalars, registered, client_state) | self._described()
        except CheckpointError as error:
            more["problem"] = str(error)
        return Job(folder, tag, parts, files, manifest, **more)

    def _described(self) -> dict[str, bytes]:
        """The files of model/, read once: a tokenizer may be large."""
        if self._model_files is None:
            files = describe_model(self._state.module, self._state.config, self._run)
            self._model_files = {f"{MODEL_FILES}/{name}": content for name, content in files.items()}
        return self._model_files

    def _outcome_of_last(self) -> str:
        """Wait for the last save. Returns what went wrong with it on this rank, once."""
        if self._writer is None:
            return ""
        with self._state.comm.telemetry.span("checkpoint") if self._writer.busy else contextlib.nullcontext():
            outcome = self._writer.wait()
        self._writer.forget()
        problem = outcome.problem if outcome is not None else ""
        if not self._reports:
            self._unreported = self._unreported or problem
        return problem

    def _unreported_problem(self) -> str:
        """The same, of the last save that has no on_done, also when others followed."""
        self._outcome_of_last()
        problem, self._unreported = self._unreported, ""
        return problem

    def _lacks_disk(self, folder: Path, blocks: list[Block]) -> str:
        """Rank 0 looks. Returns what is in the way."""
        comm = self._state.comm
        if comm.rank != 0:
            return ""
        folders.sweep(folder)  # what a killed run left there takes space
        mine = sum(part.nbytes for block in blocks if not block.alike for _, part in block.parts)
        alike = sum(part.nbytes for block in blocks if block.alike for _, part in block.parts)
        return folders.missing_space(folder, mine * comm.world_size + alike)

    def _make_ready(self, blocks: list[Block], ahead: bool = False) -> tuple[Snapshot, str]:
        """A snapshot to be taken, and memory for it. Also says what is in the way. ahead: the memory's pages are
        taken meanwhile."""
        state = self._state
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        snapshot = Snapshot(blocks, self._bounded)
        if self._memory is not None and self._memory.nbytes >= snapshot.nbytes:
            return snapshot, ""
        self._drop_memory()
        on_gpu = state.device.type == "cuda"
        if not self._bounded and not self._has_room(snapshot.nbytes, on_gpu):
            self._bounded = True
            snapshot = Snapshot(blocks, bounded=True)
        try:
            memory = SharedMemory(snapshot.nbytes, state.device if on_gpu else None)
        except (OSError, MemoryError, RuntimeError) as error:
            return snapshot, f"no memory for a copy of {snapshot.nbytes:,} bytes: {error}"
        self._memory = memory
        state.ledger.add("snapshot", memory.nbytes, offloaded=True)
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
            self._state.ledger.add("snapshot", -memory.nbytes, offloaded=True)
            memory.close()

    def _start_anew(self, generation: int) -> None:
        """A writer of the generation that the other ranks' belong to."""
        comm = self._state.comm
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._generation = generation
        store = Path(self._run.sockets) if self._run is not None else None
        if store is None:  # the writers remove it when they have met
            made = tempfile.mkdtemp(prefix=MEETING_FOLDER) if comm.rank == 0 else None
            store = Path(comm.broadcast_object(made))
        if not _open:
            at_exit(leave_all)
        _open.add(self)
        self._writer = WriterProcess(str(store / f"{self._meeting}-{generation}"), comm.rank, comm.world_size)


def _cause(problems: Iterable[str]) -> str:
    """Of what the ranks say of one save, that which is not the others' consequence; empty when it went well."""
    return min(filter(None, problems), key=lambda problem: problem.endswith(PEER_LOST), default="")
