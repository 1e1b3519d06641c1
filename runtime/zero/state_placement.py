"""The memory of a flat parameter group's masters, optimizer states and, from stage 2 on, accumulated gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.host.ledger import Ledger, zeros
from runtime.wire.messages import Category

Allocate = Callable[[int, torch.dtype], torch.Tensor]
"""Function of (numel, dtype) that returns (numel,) zeros."""


@dataclass(frozen=True)
class StatePlacement:
    """One kind of memory for states. All that is allocated in it is counted in the ledger."""

    ledger: Ledger
    allocate: Allocate
    offloaded: bool = False
    """Whether it is the host memory to which the config offloads states."""
    remote: bool = False
    """Whether it is other memory than the parameters', so that gradients and new parameters have to be copied."""

    @classmethod
    def on(cls, device: torch.device, ledger: Ledger) -> StatePlacement:
        """States in the same memory as the parameters, on `device`."""
        return cls(ledger, lambda numel, dtype: zeros(numel, dtype, device))

    def zeros(self, category: Category, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(numel,) zeros in this memory."""
        return self.hold(category, self.allocate(numel, dtype))

    def hold(self, category: Category, tensor: torch.Tensor) -> torch.Tensor:
        """Count `tensor`, which is in this memory already, and return it."""
        return self.ledger.hold(category, tensor, offloaded=self.offloaded)
