"""Whole-unit gradient buffers, lent out for the time of one backward."""

from __future__ import annotations

import torch

from runtime.comm import Comm, Pending
from runtime.memory import Ledger


class BufferPool:
    """A buffer is never given back to the allocator: faulting its pages in again would cost more than the
    reduction."""

    def __init__(self, comm: Comm, ledger: Ledger) -> None:
        self.comm, self.ledger = comm, ledger
        self._free: list[tuple[torch.Tensor, Pending]] = []

    def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised 1-D buffer of at least `numel` elements that nobody reads any more."""
        fitting = [entry for entry in self._free if entry[0].dtype == dtype and entry[0].numel() >= numel]
        if not fitting:
            return self.ledger.hold("communication", self.comm.empty(numel, dtype))
        best = min(fitting, key=lambda entry: entry[0].numel())
        self._free = [entry for entry in self._free if entry is not best]
        buffer, last_use = best
        last_use.fence()
        return buffer

    def give_back(self, buffer: torch.Tensor, last_use: Pending) -> None:
        """`last_use`: the collective that read the buffer last."""
        self._free.append((buffer, last_use))
