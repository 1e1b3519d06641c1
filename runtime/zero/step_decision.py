"""What the sums over ranks decide about the update of one optimizer step: the factor on its gradients, and whether it
is taken at all. Kernels on the device may read that before the host knows it; updates on the host wait for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Decided(NamedTuple):
    """A decision that the host knows."""

    scale: float
    """Factor that unscales and clips the gradients; NaN: the step is skipped."""
    changed: bool = False
    """Whether masters must first follow parameters that the script has changed since the last step."""

    @property
    def taken(self) -> bool:
        """Whether the step is not skipped."""
        return math.isfinite(self.scale)


@dataclass(frozen=True)
class StepDecision:
    """A decision that may still be under way."""

    read: Callable[[], Decided]
    """Waits for the decision, on any thread. Raises what has kept the ranks from deciding."""
    scale: torch.Tensor | None = None
    """() fp32 on the device: `Decided.scale`, for kernels. None: only the host will know it."""
    changed: torch.Tensor | None = None
    """() bool on the device: `Decided.changed` for this rank's own parameters. None: the host has seen to it, or
    `scale` is None."""
    is_known: bool = False
    """Whether `read` returns at once."""

    @classmethod
    def known(cls, scale: float) -> StepDecision:
        """The decision to take a step, by a host that has waited for it and has seen to changed parameters."""
        decided = Decided(scale)
        return cls(lambda: decided, is_known=True)
