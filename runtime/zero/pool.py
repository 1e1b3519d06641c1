"""A pool of full gradient buffers, each borrowed for one unit's backward."""

from __future__ import annotations

import torch

from runtime.comm import Comm, Pending
from runtime.host.ledger import Ledger


class BufferPool:
    """Reuses 1-D buffers, because page faults of fresh ones would cost more than the reduction. A buffer that is too
    small is freed for the larger one that is made instead, so there are never more than are in use at a time."""

    def __init__(self, comm: Comm, ledger: Ledger) -> None:
        self.comm, self.ledger = comm, ledger
        self._free: list[tuple[torch.Tensor, Pending]] = []

    def borrow(self, numel: int, dtype: torch.dtype, exact: bool = False) -> torch.Tensor:
        """(>= numel,) an uninitialised buffer that no collective reads any more. exact: (numel,) for a caller that
        keeps it for the whole backward."""
        fitting = [entry for entry in self._free if entry[0].dtype == dtype and _fits(entry[0].numel(), numel, exact)]
        if not fitting:
            if not exact:
                self._drop_one(dtype)
            return self.ledger.hold("communication", self.comm.empty(numel, dtype))
        best = min(fitting, key=lambda entry: entry[0].numel())
        self._free = [entry for entry in self._free if entry is not best]
        buffer, last_use = best
        last_use.fence()
        return buffer

    def _drop_one(self, dtype: torch.dtype) -> None:
        for entry in self._free:
            buffer, last_use = entry
            if buffer.dtype == dtype:
                last_use.fence()
                self.ledger.release("communication", buffer)
                self.comm.release(buffer)
                self._free = [other for other in self._free if other is not entry]
                return

    def drop_free(self) -> None:
        """Free all buffers that are not borrowed."""
        for buffer, last_use in self._free:
            last_use.fence()
            self.ledger.release("communication", buffer)
            self.comm.release(buffer)
        self._free.clear()

    def give_back(self, buffer: torch.Tensor, last_use: Pending) -> None:
        """Return a borrowed buffer. last_use: the last collective that reads it."""
        self._free.append((buffer, last_use))


def _fits(have: int, need: int, exact: bool) -> bool:
    return have == need if exact else have >= need
