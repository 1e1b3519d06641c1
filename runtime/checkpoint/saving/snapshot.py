"""A consistent copy of the training state, which a writer process reads while training continues.

shared memory   |<--- copies of the blocks that training changes --->|<- slot 0 ->|<- slot 1 ->|
                 copied at once, while training waits                  streamed blocks pass through the two slots

[Note: streamed blocks] Offloaded states are not copied as a whole, as that would double the host memory they take; nor
are any states where the host has no memory for a copy (`bounded`). The writer requests them piece by piece, each piece
is copied to a slot on request, and the next optimizer step of a flat parameter group waits until all of its pieces have
been copied. So the checkpoint is consistent without a second copy of the states.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime import native
from runtime.checkpoint.content.capture import Block
from runtime.checkpoint.saving.job import Place
from runtime.host.pinned import page_lock, page_unlock
from runtime.host.resident import outside_malloc
from runtime.plan.constants import SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS
from runtime.zero.flat import FlatParamGroup

_ALIGNMENT = 64

Hurried = Callable[[], contextlib.AbstractContextManager[None]]


class SharedMemory:
    """Anonymous shared memory, which a child process maps through `descriptor`. Pinned if `cuda` is given."""

    def __init__(self, nbytes: int, cuda: torch.device | None = None) -> None:
        """nbytes: rounded up to whole pages. Raises OSError if the system has too little memory, and
        RuntimeError if CUDA refuses to pin it."""
        self.nbytes = _aligned(nbytes, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("zerotop-checkpoint", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.nbytes)
            self._pages = mmap.mmap(self.descriptor, self.nbytes)
        except OSError:
            os.close(self.descriptor)
            raise
        outside_malloc.add(self.nbytes)
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._cuda = cuda
        if cuda is not None:
            try:
                page_lock(self.bytes.data_ptr(), self.nbytes, cuda.index or 0)
            except RuntimeError:
                self._cuda = None  # it is not locked
                self.close()
                raise

    def touch(self) -> None:
        """Fault in all pages, so that the first copy into them is as fast as later ones."""
        if native.available():
            native.touch(self.bytes.data_ptr(), self.nbytes, nodes=(), threads=1)
        else:
            self.bytes.zero_()

    def view(self, at: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,): a tensor on the memory that starts at byte `at`."""
        return self.bytes[at : at + numel * dtype.itemsize].view(dtype)

    def close(self) -> None:
        """Unpin the memory and close its descriptor; it is freed once the child and all tensors on it are gone, too."""
        if self.descriptor < 0:
            return
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            page_unlock(self.bytes.data_ptr())
        os.close(self.descriptor)
        self.descriptor = -1
        outside_malloc.add(-self.nbytes)


class Snapshot:
    """The state of the blocks at one step: `copy` copies most of them, `copy_piece` pieces of streamed blocks on
    request."""

    def __init__(self, blocks: Sequence[Block], bounded: bool = False) -> None:
        """bounded: stream everything that an optimizer step changes, and copy only buffers."""
        self._copied: list[tuple[Block, int]] = []
        self._streamed: dict[int, tuple[torch.Tensor, FlatParamGroup | None]] = {}
        self.places: list[Place] = []
        """All parts in the order in which the writer should read them."""
        at = 0
        for block in blocks:
            if block.streamed or (bounded and block.flat is not None):
                self._add_streamed(block)
            else:
                self._copied.append((block, at))
                self.places += [Place(part, at + first * part.itemsize) for first, part in block.parts]
                at = _aligned(at + block.nbytes, _ALIGNMENT)
        self.copied_bytes = at
        self._left: dict[int, int] = {}
        """id of a flat parameter group -> number of its pieces that have not been copied yet."""
        for _, flat in self._streamed.values():
            if flat is not None:
                self._left[id(flat)] = self._left.get(id(flat), 0) + 1
        self._changed = threading.Condition()
        self._event: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    def _add_streamed(self, block: Block) -> None:
        for first, whole in block.parts:
            for part in whole.split(max(1, SNAPSHOT_SLOT_BYTES // whole.itemsize)):
                piece = block.view(first + part.start - whole.start, part)
                self._streamed[len(self.places)] = (piece, block.flat)
                self.places.append(Place(part, None))

    @property
    def nbytes(self) -> int:
        """Size in bytes of the shared memory that the snapshot needs."""
        return self.copied_bytes + (SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES if self._streamed else 0)

    def copy(self, memory: SharedMemory) -> None:
        """Copy every block that is not streamed. On a GPU the copies are asynchronous: see `wait_copied`."""
        for block, at in self._copied:
            target = memory.view(at, block.tensor.numel(), block.tensor.dtype)
            if block.flat is not None and block.tensor.device.type == "cpu" and native.available():
                native.copy_past_cache(target.view(torch.uint8), block.tensor.view(torch.uint8))
            else:
                target.copy_(block.tensor, non_blocking=True)
        sources = [*(block.tensor for block, _ in self._copied), *(piece for piece, _ in self._streamed.values())]
        cuda = next((source.device for source in sources if source.device.type == "cuda"), None)
        if cuda is not None:  # another thread reads pieces on its own stream, after this point
            self._device = cuda
            self._event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
            self._event.record(torch.cuda.current_stream(cuda))

    def wait_copied(self) -> None:
        """Wait until the copies are in host memory and pieces may be read."""
        if self._event is not None:
            with self._on_device():
                self._event.synchronize()

    def copy_piece(self, index: int, memory: SharedMemory, slot: int) -> None:
        """Copy the piece of `places[index]` to a slot, for the writer."""
        piece, flat = self._streamed[index]
        target = memory.view(self._slot_at(slot), piece.numel(), piece.dtype)
        with self._on_device():
            target.copy_(piece)
        if flat is not None:
            with self._changed:
                self._left[id(flat)] -= 1
                self._changed.notify_all()

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """For threads that are not the training thread: they begin on GPU 0, and would make a context there."""
        return contextlib.nullcontext() if self._device is None else torch.cuda.device(self._device)

    def _slot_at(self, slot: int) -> int:
        return self.copied_bytes + slot * SNAPSHOT_SLOT_BYTES

    @property
    def slots(self) -> list[int]:
        """Byte offset of each slot in the shared memory."""
        return [self._slot_at(slot) for slot in range(SNAPSHOT_SLOTS)]

    def needs(self, flat: FlatParamGroup | None = None) -> bool:
        """Whether the snapshot still has to read the states of `flat`; None: any states. See [Note: streamed
        blocks]."""
        lefts = [*self._left.values()] if flat is None else [self._left.get(id(flat), 0)]
        return any(left > 0 for left in lefts)

    def wait_for(self, flat: FlatParamGroup | None = None) -> None:
        """Wait until the snapshot no longer `needs` these states."""
        with self._changed:
            self._changed.wait_for(lambda: not self.needs(flat))

    def abandon(self) -> None:
        """The writer needs no more pieces: release everyone who waits."""
        with self._changed:
            self._left.clear()
            self._changed.notify_all()


class SnapshotGuard:
    """Delays optimizer steps that would change states which the latest snapshot still has to read."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._hurried: Hurried = contextlib.nullcontext

    def protect(self, snapshot: Snapshot | None, hurried: Hurried = contextlib.nullcontext) -> None:
        """Guard `snapshot` from now on, instead of the previous one; None: nothing. hurried: entered while training
        waits for who reads the snapshot."""
        self._snapshot, self._hurried = snapshot, hurried

    def wait_for(self, flat: FlatParamGroup) -> None:
        """Wait until the master weights and optimizer states of `flat` may change."""
        self._wait(flat)

    def wait_for_all(self) -> None:
        """Wait until all states may change."""
        self._wait(None)

    def _wait(self, flat: FlatParamGroup | None) -> None:
        if self._snapshot is not None and self._snapshot.needs(flat):
            with self._hurried():
                self._snapshot.wait_for(flat)


def _aligned(nbytes: int, step: int) -> int:
    return -(-max(nbytes, 1) // step) * step
