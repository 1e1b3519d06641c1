"""A script's torch.set_default_device() is the script's: what the engine makes on the host stays there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.numerics.models import make
from tests.numerics.test_offload import offloaded
from tests.numerics.training import config, micro_batch, parameters

STEPS = 3


def train(settings: dict[str, Any], folder: str, default: str | None) -> dict[str, torch.Tensor]:
    """default: the default device while the engine works; "meta" holds no numbers, and so shows each use of it."""
    from runtime.engine.initialize import initialize

    model = make("plain")
    batches = [micro_batch(step, 0, dist.get_rank(), dist.get_world_size()) for step in range(STEPS)]
    torch.set_default_device(default)
    try:
        engine = initialize(model=model, config=settings)[0]
        for batch in batches:
            engine.backward(engine(*batch))
            engine.step()
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        found = parameters(engine)
    finally:
        torch.set_default_device(None)
    return found


CASES = [
    config(0, 1, clip=0.5),
    config(1, 1, clip=0.5),
    config(2, 1, clip=0.5, precision="bf16"),
    offloaded(config(2, 1, clip=0.5)),
    config(3, 1, clip=0.5),
]


@pytest.mark.parametrize("settings", CASES)
def test_the_default_device_changes_nothing(ranks, tmp_path, settings):
    usual = ranks(2).run(train, settings, str(tmp_path / "usual"), None)
    under_meta = ranks(2).run(train, settings, str(tmp_path / "meta"), "meta")
    for ours, theirs in zip(under_meta, usual, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
