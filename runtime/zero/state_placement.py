"""Where the states of a flat live: masters, optimizer states, and from stage 2 on accumulated gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.host.ledger import Ledger, zeros
from runtime.wire.messages import Category

Allocate = Callable[[int, torch.dtype], torch.Tensor]
"""(numel, dtype) -> (numel,) zeros."""


@dataclass(frozen=True)
class StatePlacement:
    """One place for states. Everything in it is in the ledger."""

    ledger: Ledger
    allocate: Allocate
    offloaded: bool = False
    """In host memory because the config says so."""
    remote: bool = False
    """In other memory than the parameters, so gradients and new parameters have to be copied."""

    @classmethod
    def on(cls, device: torch.device, ledger: Ledger) -> StatePlacement:
        """With the parameters."""
        return cls(ledger, lambda numel, dtype: zeros(numel, dtype, device))

    def zeros(self, category: Category, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(numel,) zeros."""
        return self.hold(category, self.allocate(numel, dtype))

    def hold(self, category: Category, tensor: torch.Tensor) -> torch.Tensor:
        """Count memory that is in this place already."""
        return self.ledger.hold(category, tensor, offloaded=self.offloaded)
