"""What decides whether the GPU updates offloaded states, and by which measurement."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402
from runtime.config import ConfigError, load  # noqa: E402
from runtime.host.ledger import zeros  # noqa: E402
from runtime.offload import placement  # noqa: E402
from runtime.plan.workload import workload_of  # noqa: E402
from tests.numerics.remote import LateStreamer, LateTransfers  # noqa: E402


def config(update: str, pin_states: bool, pin_parameters: bool) -> Any:
    return load(
        {
            "train_batch_size": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": pin_states},
                "offload_param": {"device": "cpu", "pin_memory": pin_parameters},
            },
            "zerotop": {"offload": {"update": update}},
        }
    ).resolve(2, "cuda", script=True)


def share_of(resolved: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """The GPU's share, where it would do everything if it may."""
    comm, upload = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(streamer=None, device_share=0.0)
    monkeypatch.setattr(placement, "streamer_for", lambda *_: object())
    monkeypatch.setattr(placement, "_measured_share", lambda *_: 1.0)
    where: Any = SimpleNamespace(upload=upload, working_memory=[])
    placement._set_device_share(resolved, where, comm, torch.float32, True, 1)  # type: ignore[arg-type]
    return upload.device_share


@pytest.mark.parametrize(("states", "parameters"), [(False, True), (True, False), (False, False)])
def test_the_gpu_updates_only_page_locked_memory(
    states: bool, parameters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the states and writes the offloaded parameters: either may be pageable."""
    assert share_of(config("auto", states, parameters), monkeypatch) == 0.0
    keys = [key for key, pin in (("offload_optimizer", states), ("offload_param", parameters)) if not pin]
    with pytest.raises(ConfigError) as caught:
        share_of(config("gpu", states, parameters), monkeypatch)
    for key in ("offload_optimizer", "offload_param"):
        assert (f"{key}.pin_memory" in str(caught.value)) == (key in keys)


@pytest.mark.parametrize(("pins", "streams"), [((True, True), True), ((True, False), False), ((False, True), False)])
def test_the_plan_has_room_for_chunks_only_then(
    pins: tuple[bool, bool], streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = config("auto", *pins)
    assert share_of(resolved, monkeypatch) == float(streams)
    assert (workload_of(resolved, "a plan", [("root", 100)], None).stream_chunk_bytes > 0) == streams


@pytest.mark.skipif(not native.available(), reason="the CPU kernels are not built (no C++ compiler)")
@pytest.mark.parametrize("accumulate", [torch.float32, torch.bfloat16])
def test_rates_are_measured_with_gradients_as_they_will_be(
    accumulate: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's slots have room for these, and CUDA refuses wider ones."""
    seen = set()

    class Streamer(LateStreamer):
        def update(self, pieces: Sequence[native.Range], *rest: Any) -> Any:
            seen.update(piece.g.dtype for piece in pieces)
            return super().update(pieces, *rest)

    monkeypatch.setattr(placement, "SAMPLE", 4096)
    host = torch.device("cpu")
    rates = placement._rates(
        Streamer(), LateTransfers(), lambda numel, dtype: zeros(numel, dtype, host), host, accumulate, 1
    )
    assert seen == {accumulate} and min(rates) > 0
