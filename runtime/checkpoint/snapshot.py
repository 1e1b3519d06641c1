"""What a checkpoint holds of one moment, for a writer process that reads it while training goes on.

shared memory   |<--- copies: every block that training changes --->|<- slot 0 ->|<- slot 1 ->|
                 made at once, while training waits                   blocks that stay: read through the two slots

[Note: blocks that stay]
States that live in host memory because the config says so are never copied as a whole: memory is what offload saves.
Nor are any where the host has no room for a copy (`bounded`). The writer asks for one piece after the other; each is
copied to a slot when it is asked for, and the next update of a flat waits until all of its pieces have been. So a
checkpoint holds one moment without a second copy of the states.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime import native
from runtime.checkpoint.capture import Block, Part
from runtime.host.pinned import page_lock, page_unlock
from runtime.plan.constants import SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS
from runtime.zero.flat import FlatParamGroup

_ALIGNMENT = 64


class SharedMemory:
    """Memory of this process that a child maps too, through its descriptor. Page-locked where `cuda` is given."""

    def __init__(self, nbytes: int, cuda: torch.device | None = None) -> None:
        """Raises OSError where the system has not so much."""
        self.nbytes = _aligned(nbytes, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("zerotop-checkpoint", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.nbytes)
            self._pages = mmap.mmap(self.descriptor, self.nbytes)
        except OSError:
            os.close(self.descriptor)
            raise
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._cuda = cuda
        if cuda is not None:
            page_lock(self.bytes.data_ptr(), self.nbytes, cuda.index or 0)

    def touch(self) -> None:
        """Take the pages now, so that the first copy into them is as fast as the later ones."""
        if native.available():
            native.touch(self.bytes.data_ptr(), self.nbytes, nodes=(), threads=1)
        else:
            self.bytes.zero_()

    def view(self, at: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self.bytes[at : at + numel * dtype.itemsize].view(dtype)

    def close(self) -> None:
        """The memory goes when the child has let go of it too, and no tensor is on it."""
        if self.descriptor < 0:
            return
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            page_unlock(self.bytes.data_ptr())
        os.close(self.descriptor)
        self.descriptor = -1


def map_shared(descriptor: int, nbytes: int) -> mmap.mmap:
    """The writer's side of a SharedMemory. Writable, because torch warns about tensors on other memory."""
    return mmap.mmap(descriptor, nbytes)


@dataclass(frozen=True)
class Place:
    """Where the writer finds a part: `at` in shared memory; or it asks for it."""

    part: Part
    at: int | None


class Snapshot:
    """One moment of the blocks. `copy` makes it; `feed` hands on pieces of blocks that stay."""

    def __init__(self, blocks: Sequence[Block], bounded: bool = False) -> None:
        """bounded: only what a forward changes (buffers) is copied."""
        self._copied: list[tuple[Block, int]] = []
        self._fed: dict[int, tuple[torch.Tensor, FlatParamGroup | None]] = {}
        self.places: list[Place] = []
        """In the order in which they should be written."""
        at = 0
        for block in blocks:
            if block.stays or (bounded and block.flat is not None):
                self._add_fed(block)
            else:
                self._copied.append((block, at))
                self.places += [Place(part, at + first * part.dtype.itemsize) for first, part in block.parts]
                at = _aligned(at + block.nbytes, _ALIGNMENT)
        self.copied_bytes = at
        self._left: dict[int, int] = {}
        """Pieces still to be read of each flat, by its id."""
        for _, flat in self._fed.values():
            if flat is not None:
                self._left[id(flat)] = self._left.get(id(flat), 0) + 1
        self._changed = threading.Condition()
        self._event: torch.cuda.Event | None = None

    def _add_fed(self, block: Block) -> None:
        for first, whole in block.parts:
            for part in whole.split(max(1, SNAPSHOT_SLOT_BYTES // whole.dtype.itemsize)):
                piece = block.view(first + part.start - whole.start, part)
                self._fed[len(self.places)] = (piece, block.flat)
                self.places.append(Place(part, None))

    @property
    def nbytes(self) -> int:
        """Of shared memory that it needs."""
        return self.copied_bytes + (SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES if self._fed else 0)

    def copy(self, memory: SharedMemory) -> None:
        """Every block that training changes. On a GPU the copies are only begun: `copied` and `wait_device` say when
        they are done."""
        for block, at in self._copied:
            target = memory.view(at, block.tensor.numel(), block.tensor.dtype)
            if block.flat is not None and block.tensor.device.type == "cpu" and native.available():
                native.copy_past_cache(target.view(torch.uint8), block.tensor.view(torch.uint8))
            else:
                target.copy_(block.tensor, non_blocking=True)
        sources = [*(block.tensor for block, _ in self._copied), *(piece for piece, _ in self._fed.values())]
        cuda = next((source.device for source in sources if source.device.type == "cuda"), None)
        if cuda is not None:  # pieces are read from another stream: when this one has come to here
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(cuda))

    def copied(self) -> None:
        """Returns when the copies are in host memory, and pieces may be read."""
        if self._event is not None:
            self._event.synchronize()

    def feed(self, index: int, memory: SharedMemory, slot: int) -> None:
        """Copy the piece of `places[index]` to a slot."""
        piece, flat = self._fed[index]
        target = memory.view(slot_at(self.copied_bytes, slot), piece.numel(), piece.dtype)
        target.copy_(piece)
        if flat is not None:
            with self._changed:
                self._left[id(flat)] -= 1
                self._changed.notify_all()

    def wait_for(self, flat: FlatParamGroup) -> None:
        """Returns when `flat` may change. See [Note: blocks that stay]."""
        with self._changed:
            self._changed.wait_for(lambda: self._left.get(id(flat), 0) <= 0)

    def wait_for_all(self) -> None:
        """Returns when everything may change."""
        with self._changed:
            self._changed.wait_for(lambda: all(left <= 0 for left in self._left.values()))

    def give_up(self) -> None:
        """Nobody reads it any more: nothing waits for it."""
        with self._changed:
            self._left.clear()
            self._changed.notify_all()


class SnapshotGuard:
    """Lets updates wait for what a checkpoint still reads. Holds the snapshot that was taken last."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None

    def hold(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot

    def wait_for(self, flat: FlatParamGroup) -> None:
        """Returns when the masters and states of `flat` may change."""
        if self._snapshot is not None:
            self._snapshot.wait_for(flat)

    def wait_for_all(self) -> None:
        """Returns when everything may change."""
        if self._snapshot is not None:
            self._snapshot.wait_for_all()


def slot_at(copied_bytes: int, slot: int) -> int:
    return copied_bytes + slot * SNAPSHOT_SLOT_BYTES


def _aligned(nbytes: int, step: int) -> int:
    return -(-max(nbytes, 1) // step) * step
