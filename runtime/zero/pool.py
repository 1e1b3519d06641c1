"""Whole-unit gradient buffers, lent out for the time of one backward."""

from __future__ import annotations

import torch

from runtime.comm import Comm, Pending
from runtime.host.ledger import Ledger


class BufferPool:
    """Buffers are kept: faulting their pages in again would cost more than the reduction. Only one that is too small
    makes room for the larger one that is needed instead, so that there are never more than are in use at a time."""

    def __init__(self, comm: Comm, ledger: Ledger) -> None:
        self.comm, self.ledger = comm, ledger
        self._free: list[tuple[torch.Tensor, Pending]] = []

    def borrow(self, numel: int, dtype: torch.dtype, exact: bool = False) -> torch.Tensor:
        """An uninitialised 1-D buffer of at least `numel` elements that nobody reads any more. exact: of just so many,
        for who keeps it long."""
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
        """Give all memory back that nobody borrows now."""
        for buffer, last_use in self._free:
            last_use.fence()
            self.ledger.release("communication", buffer)
            self.comm.release(buffer)
        self._free.clear()

    def give_back(self, buffer: torch.Tensor, last_use: Pending) -> None:
        """`last_use`: the collective that read the buffer last."""
        self._free.append((buffer, last_use))


def _fits(have: int, need: int, exact: bool) -> bool:
    return have == need if exact else have >= need
