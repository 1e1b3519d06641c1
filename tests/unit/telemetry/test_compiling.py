"""Heartbeats say that torch.compile compiles, in its first compilation and in later ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.telemetry.compiling import Compilations
from runtime.telemetry.publisher import Telemetry
from runtime.wire.messages import Heartbeat
from runtime.wire.rundir import Sockets


def a_beat(telemetry: Telemetry) -> Heartbeat:
    """What the publisher would send now."""
    (beat,) = [one for one in telemetry._measured() if isinstance(one, Heartbeat)]
    return beat


def test_a_heartbeat_says_that_torch_compile_compiles() -> None:
    import torch._dynamo

    telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(Path("unused")))
    assert not a_beat(telemetry).compiling
    during: list[Heartbeat] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        during.append(a_beat(telemetry))
        return module.forward  # what the backend "eager" does

    for shape in ((2,), (2, 3), (2, 3, 4)):
        telemetry.enter("forward", step=500)
        begun_ns = a_beat(telemetry).progress_ns
        torch.compile(lambda x: x + 1, backend=backend, dynamic=False)(torch.zeros(shape))
        after = a_beat(telemetry)
        # The end of a compilation is progress: its rank was not idle until the next phase.
        assert during[-1].compiling and not after.compiling
        assert begun_ns < during[-1].progress_ns < after.progress_ns
        torch._dynamo.reset()  # removes all callbacks
    assert len(during) == 3


def test_nothing_is_imported_to_find_out() -> None:
    code = (
        "import sys; from runtime.telemetry.compiling import Compilations; one = Compilations(); one.look(); "
        "assert not one.active and not any(name.startswith('torch') for name in sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module",
    [
        SimpleNamespace(),
        SimpleNamespace(callback_handler=SimpleNamespace()),
        SimpleNamespace(callback_handler=SimpleNamespace(start_callbacks=[])),
    ],
)
def test_a_torch_without_such_callbacks_is_no_error(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo.callback", module)
    compilations = Compilations()
    compilations.look()
    assert not compilations.active
