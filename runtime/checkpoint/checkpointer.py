"""`Checkpointer`: saves and loads the training state of one engine.

save     the ranks write the checkpoint themselves; training waits
begin    the ranks copy their state; one writer process per rank writes the copy while training continues
load     continue from a checkpoint of any world size, stage and division into units
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtime.checkpoint.content.buffers import BufferOwners, find_buffer_owners
from runtime.checkpoint.content.capture import Block, blocks_of, bytes_of
from runtime.checkpoint.content.describe import describe_model, describe_training
from runtime.checkpoint.content.registered import ScriptState
from runtime.checkpoint.content.small_files import (
    Scalars,
    common_file,
    manifest_of,
    merge_scalars,
    own_files,
    own_scalars,
)
from runtime.checkpoint.format import folder as folders
from runtime.checkpoint.format.manifest import (
    LOAD_EVERYTHING,
    MODEL_FILES,
    CheckpointError,
    DamagedCheckpoint,
    LoadOptions,
)
from runtime.checkpoint.format.slices import Part
from runtime.checkpoint.saving.commit import write
from runtime.checkpoint.saving.job import SAVE_DEFAULTS, Job, SaveOptions
from runtime.checkpoint.saving.protocol import PEER_LOST
from runtime.checkpoint.saving.snapshot import SharedMemory, Snapshot, SnapshotGuard
from runtime.checkpoint.saving.writer_group import listen, listen_anywhere, listen_for_hosts
from runtime.checkpoint.saving.writer_handle import Outcome, WriterProcess
from runtime.host.memory_limits import host_has_room
from runtime.models.names import has_adapters
from runtime.models.origin import origin_of
from runtime.process.forked import Owner, at_exit
from runtime.process.host_id import host_id
from runtime.state.train_state import TrainState
from runtime.wire.rundir import RunFile
from runtime.wire.sizes import format_size

LEAVE_S = 60.0
"""Seconds to wait for a running save when a script drops its engine."""
log = logging.getLogger("runtime.checkpoint")

_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()
"""Checkpointers with a writer process."""


def leave_all(patience_s: float | None = None) -> None:
    """Finish running saves and end all writer processes before this process exits: see `Checkpointer.leave`."""
    for checkpointer in list(_open):
        checkpointer.leave(patience_s)


class Checkpointer:
    """Saves and loads the training state of one engine. `prepare` or the first `begin` starts the writer process."""

    def __init__(
        self,
        state: TrainState,
        script: ScriptState,
        guard: SnapshotGuard,
        run: RunFile | None,
        attempt: int = 1,
        engine_number: int = 1,
    ) -> None:
        """run: the run that this process belongs to, if any. attempt, engine_number: part of the name under which the
        writers of all ranks find each other."""
        self._state, self._script, self._guard, self._run = state, script, guard, run
        self._meeting = f"writers-{attempt}-{engine_number}"
        self._process = Owner()
        self._writer: WriterProcess | None = None
        self._generation = 0
        self._memory: SharedMemory | None = None
        self._touching: threading.Thread | None = None
        self._prepared = False
        self._reports = False
        """Whether the outcome of the last save goes to an on_done callback."""
        self._unreported = ""
        """Error of an earlier save without on_done, until it is raised."""
        self._bounded = False
        """Whether states are streamed to the writer because the host has no memory for a full copy."""
        self._model_files: dict[str, bytes] | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank's writer process is writing a checkpoint."""
        return self._writer is not None and self._writer.busy

    # ---- collective: called by all ranks at the same step ------------------------------------------------------------
    def save(self, folder: Path, tag: str, client_state: dict[str, Any], options: SaveOptions = SAVE_DEFAULTS) -> Path:
        """Write FOLDER/TAG and return its path. Collective.

        Raises CheckpointError on every rank if any rank fails to write; no partial checkpoint is left behind.
        """
        state = self._state
        state.synchronize()
        owners = find_buffer_owners(state)
        blocks = blocks_of(state, owners, options.with_frozen)
        views = [(part, block.view(at, part)) for block in blocks for at, part in block.parts]
        scalars = merge_scalars(state.comm.gather_objects(own_scalars(state)))
        job = self._job(folder, tag, [part for part, _ in views], scalars, client_state, owners, options)
        write(job, lambda index: bytes_of(views[index][1]), state.comm)
        return job.final

    def begin(
        self,
        folder: Path,
        tag: str,
        client_state: dict[str, Any],
        on_done: Callable[[Outcome], None] | None = None,
        *,
        options: SaveOptions | None = None,
        keep: int = 0,
        keep_every: int = 0,
    ) -> Path:
        """Copy the current state and start writing it to FOLDER/TAG; returns that path at once. Waits for an earlier
        save first. on_done: called with the outcome from another thread, on every rank. options: None leaves frozen
        parameters out if the files of the base model have them. Collective.

        Raises CheckpointError on every rank if any rank cannot begin, with nothing written. Without on_done it also
        raises the failure of an earlier save that had no on_done.
        """
        state, began = self._state, time.monotonic()
        options = options or automatic_options(state)
        state.synchronize()
        failed = self._unreported_problem()
        owners = find_buffer_owners(state)
        blocks = blocks_of(state, owners, options.with_frozen)
        problem = self._disk_problem(folder, blocks)
        snapshot, no_memory = self._prepare_snapshot(blocks)
        problem = problem or no_memory
        alive = self._writer is not None and self._writer.alive
        scalars = own_scalars(state)
        reports = state.comm.gather_objects((problem, failed, alive, self._generation, scalars))
        if on_done is None and (earlier := _root_problem(failed for _, failed, *_ in reports)):
            raise CheckpointError(earlier)
        self._unreported = failed  # a later call without on_done raises it
        problems = [(rank, found) for rank, (found, *_) in enumerate(reports) if found]
        if problems:
            raise CheckpointError(f"could not write {folder / tag}: rank {problems[0][0]}: {problems[0][1]}")
        if not all(lives for _, _, lives, *_ in reports):
            self._start_writer(1 + max(generation for *_, generation, _ in reports))
        assert self._memory is not None and self._writer is not None
        snapshot.copy(self._memory)
        parts = [place.part for place in snapshot.places]
        all_scalars = merge_scalars([each for *_, each in reports])
        job = self._job(
            folder, tag, parts, all_scalars, client_state, owners, options, keep=keep, keep_every=keep_every
        )
        self._guard.protect(snapshot, self._writer.hurried)
        self._reports = on_done is not None
        self._writer.save(job, snapshot, self._memory, on_done or (lambda outcome: None), time.monotonic() - began)
        return job.final

    def wait_for_save(self) -> str:
        """Wait for the last save. Returns its error on any rank, once; empty if it succeeded. Collective."""
        return _root_problem(self._state.comm.gather_objects(self._outcome_of_last()))

    def wait_for_unreported(self) -> str:
        """Wait for the last save. Returns the error, on any rank, of a save without on_done, once; empty if there is
        none. Collective."""
        return _root_problem(self._state.comm.gather_objects(self._unreported_problem()))

    def load(self, path: Path, options: LoadOptions = LOAD_EVERYTHING) -> None:
        """Load the checkpoint at `path`. Objects registered later receive their saved state on registration.
        Collective.

        Raises CheckpointError on every rank, before anything is changed, if it does not fit the model.
        """
        from runtime.checkpoint.load import load

        loaded = load(self._state, self._script.registered, self._guard, path, options)
        self._script.client_state = loaded.client_state
        self._script.last_checkpoint = path
        if options.progress:
            self._state.discard_accumulated()
        self._script.registered.restore(loaded.registered, loaded.generators)

    def load_newest(
        self, folder: Path, options: LoadOptions = LOAD_EVERYTHING, tell: Callable[[str], None] = log.error
    ) -> Path | None:
        """Load the newest complete, undamaged checkpoint in `folder` and return its path, or None. tell: called on rank
        0 with a message for each damaged checkpoint that was skipped. Collective."""
        comm = self._state.comm
        found = [entry.path.name for entry in folders.complete_checkpoints(folder) if entry.latest]
        for path in (folder / name for name in reversed(comm.broadcast_object(found))):
            try:
                self.load(path, options)
            except DamagedCheckpoint as error:
                if comm.rank == 0:
                    tell(f"{error}: trying the previous checkpoint")
                continue
            return path
        return None

    # ---- local to this rank ------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Allocate memory and start the writer process ahead of the first `begin`, so that it is as fast as later ones.
        Not collective."""
        if self._prepared or self._run is None:
            return
        self._prepared, state = True, self._state
        if self._writer is not None:
            return
        _, problem = self._prepare_snapshot(blocks_of(state, owners=None), ahead=True)
        own_files(state.comm.rank, self._script.registered.generators)  # warms up torch.save's imports
        if state.comm.rank == 0:
            self._describe_model_files()
        if not problem:
            self._start_writer(1)

    def wait_briefly(self, patience_s: float) -> bool:
        """Wait for the running save for at most `patience_s` seconds. Returns whether it is done."""
        assert self._writer is not None
        with self._state.comm.telemetry.span("checkpoint"):
            self._writer.wait(patience_s)
        return not self.busy

    def leave(self, patience_s: float | None = None) -> None:
        """Wait for the running save (at most `patience_s` seconds; None: without limit), then end the writer process.
        Does nothing in a forked child."""
        if not self._process.is_here:
            return
        if self._writer is not None:
            self._writer.wait(patience_s)
        self.close()

    def close(self) -> None:
        """End the writer process and free its shared memory. A second call does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._guard.protect(None)
        self._drop_memory()

    def __del__(self) -> None:
        if self._writer is not None or self._memory is not None:
            self.leave(LEAVE_S)

    # ---- helpers ----------------------------------------------------------------------------------------------------
    def _job(
        self,
        folder: Path,
        tag: str,
        parts: list[Part],
        scalars: Scalars,
        client_state: dict[str, Any],
        owners: BufferOwners,
        options: SaveOptions,
        **more: Any,
    ) -> Job:
        """The work order of this rank's writer, without tensors. What cannot be serialized is reported in
        `Job.problem`."""
        state, registered = self._state, self._script.registered
        files = own_files(state.comm.rank, registered.generators)
        more["refuses_nan"] = has_adapters(part.name for part in parts)
        if state.comm.rank != 0:
            return Job(folder, tag, parts, files, **more)
        manifest = manifest_of(state, owners, options.with_frozen)
        manifest = manifest.model_copy(update={"saved_wall_s": time.time(), "latest": options.latest})
        try:
            files |= common_file(state, scalars, registered, client_state) | self._describe_model_files()
            files |= _in_model_folder(describe_training(state.module, state.config, manifest))
        except CheckpointError as error:
            more["problem"] = str(error)
        return Job(folder, tag, parts, files, manifest, **more)

    def _describe_model_files(self) -> dict[str, bytes]:
        """The files of model/ by name, cached: a tokenizer may be large."""
        if self._model_files is None:
            files = describe_model(self._state.module, self._state.config, self._run)
            self._model_files = _in_model_folder(files)
        return self._model_files

    def _outcome_of_last(self) -> str:
        """Wait for the last save. Returns its error on this rank, once."""
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
        """The error on this rank of the last save without on_done, even if others followed; once."""
        self._outcome_of_last()
        problem, self._unreported = self._unreported, ""
        return problem

    def _disk_problem(self, folder: Path, blocks: list[Block]) -> str:
        """Why the disk cannot take this checkpoint, checked on rank 0; empty if it can."""
        comm = self._state.comm
        if comm.rank != 0:
            return ""
        folders.remove_leftovers(folder)  # partial checkpoints of killed runs take space
        mine = sum(part.nbytes for block in blocks if not block.replicated for _, part in block.parts)
        replicated = sum(part.nbytes for block in blocks if block.replicated for _, part in block.parts)
        return folders.disk_space_problem(folder, mine * comm.world_size + replicated)

    def _prepare_snapshot(self, blocks: list[Block], ahead: bool = False) -> tuple[Snapshot, str]:
        """Plan a snapshot and allocate its shared memory. Returns it and why there is no memory (empty if there is).
        ahead: fault the pages in on another thread."""
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
            return (
                snapshot,
                f"no {format_size(snapshot.nbytes)} of shared memory for the checkpoint copy: {error}",
            )
        self._memory = memory
        state.ledger.add("snapshot", memory.nbytes, offloaded=True)
        if ahead:
            self._touching = threading.Thread(target=memory.touch, daemon=True)
            self._touching.start()
        return snapshot, ""

    def _has_room(self, nbytes: int, pin: bool) -> bool:
        """Whether this host has memory for the copies of all its ranks; the OOM killer would end a run that
        overcommits."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = host_has_room(nbytes, pin=pin, local_world=ranks)  # so does zerotop/state/forecast.py
        if not room:
            log.warning(
                f"this host has no memory for {ranks} checkpoint copies of {format_size(nbytes)}: checkpoints are "
                "written piece by piece without a copy, so the step after one may wait for the disk"
            )
        return room

    def _drop_memory(self) -> None:
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        memory, self._memory = self._memory, None
        if memory is not None:
            self._state.ledger.add("snapshot", -memory.nbytes, offloaded=True)
            memory.close()

    def _start_writer(self, generation: int) -> None:
        """Start a new writer process; all ranks use the same `generation`, by which their writers find each other."""
        comm = self._state.comm
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._generation = generation
        address, listener = self._meeting_place(generation)
        if not _open:
            at_exit(leave_all)
        _open.add(self)
        self._writer = WriterProcess(address, comm.rank, comm.world_size, listener)

    def _meeting_place(self, generation: int) -> tuple[str, socket.socket | None]:
        """The address at which the writers meet, and on rank 0 the socket that listens there. Outside a run the ranks
        agree on it, so all of them must call it."""
        comm, listener = self._state.comm, None
        if self._run is not None:
            path = Path(self._run.sockets) / f"{self._meeting}-{generation}"
            try:
                listener = listen(path) if comm.rank == 0 else None
            except OSError as error:  # the writers will not meet, and the checkpoint fails on all ranks
                log.warning(f"can't listen for writers at {path}: {error.strerror or error}")
            return str(path), listener
        one_host = len({tuple(found) for found in comm.gather_objects(_host())}) == 1
        address = problem = ""
        if comm.rank == 0:
            try:
                address, listener = listen_anywhere() if one_host else listen_for_hosts()
            except OSError as error:
                problem = f"no writer processes: can't listen for them: {error.strerror or error}"
        address, problem = comm.broadcast_object((address, problem))
        if problem:
            raise CheckpointError(problem)
        return address, listener


def _host() -> tuple[str, ...]:
    try:
        return host_id()
    except OSError:  # not Linux
        return (socket.gethostname(),)


def automatic_options(state: TrainState) -> SaveOptions:
    """How a run saves by itself: without frozen parameters that can be read from the base model's files again."""
    origin = origin_of(state.module)
    return SaveOptions(with_frozen=origin is None or not origin.complete)


def _in_model_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{MODEL_FILES}/{name}": content for name, content in files.items()}


def _root_problem(problems: Iterable[str]) -> str:
    """The error that caused the others: one that is not just a lost peer, where there is one; empty if there is
    none."""
    return min(filter(None, problems), key=lambda problem: problem.endswith(PEER_LOST), default="")
