"""Host memory for tensors that come and go in every step: pieces of large slabs, which are pinned once.

Page-locking takes longer than copying, so memory that is given back is kept for the next step. Pieces of different
sizes share slabs, so that batches of changing lengths do not need slabs for each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.host.pinned import Arena

if TYPE_CHECKING:
    import torch

    from runtime.host.ledger import Ledger
    from runtime.wire.messages import Category

SLAB_BYTES = 1 << 26
"""Bytes of a slab, if no single piece needs more."""
ALIGNMENT = 512
"""Pieces begin at multiples of this, at which copies are fast."""


class _Slab:
    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory  # (nbytes,) uint8
        self.free = [(0, memory.numel())]
        """Free intervals in ascending order, none next to another."""

    def take(self, nbytes: int) -> int | None:
        """The beginning of `nbytes` that were free, the first that are; None if there are none."""
        for index, (start, end) in enumerate(self.free):
            if end - start >= nbytes:
                self.free[index : index + 1] = [(start + nbytes, end)] if start + nbytes < end else []
                return start
        return None

    def give_back(self, start: int, end: int) -> None:
        before = [interval for interval in self.free if interval[1] < start]
        after = [interval for interval in self.free if interval[0] > end]
        for interval in self.free[len(before) : len(self.free) - len(after)]:  # neighbours
            start, end = min(start, interval[0]), max(end, interval[1])
        self.free = [*before, (start, end), *after]


class Piece:
    """Memory that returns to its slab when this is garbage."""

    def __init__(self, owner: Slabs, slab: _Slab, start: int, nbytes: int, taken: int) -> None:
        self._owner, self._slab, self._start, self._taken = owner, slab, start, taken
        self.tensor = slab.memory[start : start + nbytes]  # (nbytes,) uint8

    def __del__(self) -> None:
        self._owner._give_back(self._slab, self._start, self._taken)


class Slabs:
    """Hands out pieces of host memory. Slabs are freed when none is in use and they have become far too large."""

    def __init__(
        self, pin: bool, device: int = 0, ledger: Ledger | None = None, category: Category = "buffers"
    ) -> None:
        """pin: whether to page-lock them, for the GPU `device`. ledger: where they are counted, as `category`."""
        self._pin, self._device, self._ledger, self._category = pin, device, ledger, category
        self._arena = Arena(pin=pin, device=device)
        self._slabs: list[_Slab] = []
        self.used_bytes = 0
        """Bytes of all pieces, in multiples of ALIGNMENT."""
        self._peak_bytes = 0
        """Largest used_bytes since none was used."""
        if ledger is not None and pin:
            others = ledger.pinned
            ledger.pinned = lambda: _added(others(), (self._arena.requested_bytes, self._arena.real_bytes))

    @property
    def held_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.memory.numel() for slab in self._slabs)

    def take(self, nbytes: int) -> Piece:
        """`nbytes` of memory with any content."""
        taken = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        for slab in self._slabs:
            start = slab.take(taken)
            if start is not None:
                break
        else:
            slab = self._new_slab(max(taken, SLAB_BYTES))
            start = slab.take(taken)
            assert start is not None
        self.used_bytes += taken
        self._peak_bytes = max(self._peak_bytes, self.used_bytes)
        return Piece(self, slab, start, nbytes, taken)

    def _new_slab(self, nbytes: int) -> _Slab:
        import torch

        slab = _Slab(self._arena.zeros(nbytes, torch.uint8))
        self._slabs.append(slab)
        self._count(nbytes)
        return slab

    def _give_back(self, slab: _Slab, start: int, taken: int) -> None:
        slab.give_back(start, start + taken)
        self.used_bytes -= taken
        if self.used_bytes:
            return
        if self.held_bytes > 2 * self._peak_bytes + SLAB_BYTES:
            self._count(-self.held_bytes)
            self._slabs = []
            self._arena.close()
        self._peak_bytes = 0

    def _count(self, nbytes: int) -> None:
        if self._ledger is not None:
            self._ledger.add(self._category, nbytes, offloaded=True)


def _added(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]
