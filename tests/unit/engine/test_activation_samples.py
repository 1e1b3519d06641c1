from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.engine import activation_samples
from runtime.engine.activation_samples import FIRST_STEP, INTERVAL, ActivationSamples
from runtime.host.ledger import Ledger
from runtime.telemetry import NullTelemetry


def made(telemetry: Any, compiled: bool = False) -> tuple[ActivationSamples, Any, nn.Module]:
    """Samples of an engine whose model has one unit, in its first step; its state; the unit's module."""
    module = nn.Linear(4, 4)
    state = SimpleNamespace(
        ledger=Ledger(),
        device=torch.device("cpu"),
        units=[SimpleNamespace(name="blocks.0", modules=[module])],
        counters=SimpleNamespace(global_steps=1),
        config=SimpleNamespace(zerotop=SimpleNamespace(model=SimpleNamespace(compile=compiled))),
    )
    return ActivationSamples(state, telemetry), state, module  # type: ignore[arg-type]


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_the_second_step_and_then_one_in_so_many_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(0, 10**6, 100))
    monkeypatch.setattr(activation_samples, "activation_bytes", lambda state: lambda: next(readings))
    samples, state, module = made(SimpleNamespace(phase="forward"))
    measured = []
    for step in range(1, 2 * INTERVAL + FIRST_STEP + 1):
        state.counters.global_steps = step
        samples.at_boundary()
        if hooks(module):
            measured.append(step + 1)
        module(torch.ones(4))
    assert measured == [FIRST_STEP, INTERVAL + FIRST_STEP, 2 * INTERVAL + FIRST_STEP]
    assert state.ledger.unit_activations == {"blocks.*": (1, 100)}


def test_an_engine_that_leaves_its_model_takes_the_hooks_along() -> None:
    samples, _, module = made(SimpleNamespace(phase="forward"))
    samples.at_boundary()
    assert hooks(module) == 2
    samples.detach()
    assert hooks(module) == 0


@pytest.mark.parametrize(
    ("telemetry", "compiled"), [(NullTelemetry(), False), (SimpleNamespace(phase="forward"), True)]
)
def test_nothing_is_measured_where_nobody_looks_or_blocks_are_compiled(telemetry: Any, compiled: bool) -> None:
    samples, _, module = made(telemetry, compiled)
    samples.at_boundary()
    assert hooks(module) == 0
