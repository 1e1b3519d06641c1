"""Measures in a step now and then which units leave how many activations for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from runtime.diagnose.unit_activations import UnitActivations, by_kind
from runtime.host.ledger import host_ledger_bytes
from runtime.host.rss_parts import account
from runtime.plan.inflight import ALWAYS_OPEN
from runtime.state.train_state import TrainState
from runtime.telemetry import NullTelemetry, Telemetry

FIRST_STEP = 2
"""In the first one caches and states come into being."""
INTERVAL = 200
"""Steps between two measured ones. A reading takes some 50 us on a CPU: one in 200 steps is not seen in the speed."""


class ActivationSamples:
    """Of one engine; what was found is in its ledger."""

    def __init__(self, state: TrainState, telemetry: Telemetry | NullTelemetry) -> None:
        self._state, self._telemetry = state, telemetry
        self._measured: UnitActivations | None = None

    def at_boundary(self) -> None:
        """End a measured step, and begin one that is to be measured. Call it after each step. Blocks that torch.compile
        has compiled are not measured: hooks would have it compile them again."""
        if self._measured is not None:
            self._state.ledger.unit_activations = by_kind(self._measured.kept)
            self.detach()
        following = self._state.counters.global_steps + 1
        watched, compiled = not isinstance(self._telemetry, NullTelemetry), self._state.config.zerotop.model.compile
        if following % INTERVAL == FIRST_STEP and watched and not compiled:
            self._measured = unit_activations(self._state, self._telemetry)
            self._measured.begin()

    def detach(self) -> None:
        """Remove the hooks of a measured step."""
        if self._measured is not None:
            self._measured.stop()
            self._measured = None


def unit_activations(state: TrainState, telemetry: Telemetry | NullTelemetry) -> UnitActivations:
    """What measures the units of this state."""
    # The others have modules that contain those of these.
    units: list[tuple[str, list[nn.Module]]] = [
        (unit.name, unit.modules) for unit in state.units if unit.name not in ALWAYS_OPEN
    ]
    return UnitActivations(units, activation_bytes(state), lambda: telemetry.phase == "forward")


def activation_bytes(state: TrainState) -> Callable[[], int | None]:
    """A function that returns what memory holds now beyond the ledger; None if that is not known."""
    ledger, device = state.ledger, state.device
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device) - sum(ledger.totals().values())
    return lambda: account().heap_activations(host_ledger_bytes(ledger, device))
