"""The way between a flat's states in host memory and its parameters on a device: gradients come down, new parameters go
up.

thread   | update unit 0 -> slot A | update unit 1 -> slot B | update unit 2 -> slot A ...      page-locked, two of them
copy                               | A -> GPU                | B -> GPU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.transfer import Copy, Transfers
from runtime.zero.downlink import Downlink
from runtime.zero.flat import Flat


@dataclass
class HostSide:
    """Shared by the rules of all flats whose states are in other memory than their parameters. Only the thread that
    updates may use it."""

    transfers: Transfers
    downlink: Downlink
    buffers: list[torch.Tensor]
    """Page-locked byte buffers, each as large as the largest range of new parameters."""
    after: Any = None
    """The computing stream's point up to which the old parameters are read."""
    _copies: list[Copy | None] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._copies = [None] * len(self.buffers)

    def gradient(self, flat: Flat) -> torch.Tensor:
        """(state range,) in host memory. Below stage 2 it comes down only now, to memory that the next call takes."""
        if flat.policy.own_gradients:
            return flat.gradient
        return self.downlink.fetch(flat.gradient, self.after)

    def deliver(self, flat: Flat, update: Callable[[torch.Tensor | None], None]) -> None:
        """`update(out)` leaves new masters, and what they round to in `out` (own range,), unless that is None. The new
        parameters go up to where they are used; `flat.arrival` is the copy."""
        own = flat.own_parameters
        if not flat.apart:  # offloaded parameters wait where their masters are
            update(own if own is not flat.masters else None)
        elif own.dtype == flat.masters.dtype:
            update(None)
            flat.arrival = self.transfers.up(flat.masters, own, self.after)
        else:
            slot = self._sent % len(self.buffers)
            self._sent += 1
            if (last := self._copies[slot]) is not None:
                last.wait_host()
            out = self.buffers[slot][: own.numel() * own.element_size()].view(own.dtype)
            update(out)
            flat.arrival = self._copies[slot] = self.transfers.up(out, own, self.after)
