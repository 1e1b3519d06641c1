"""What a profiler shows of a step: each unit's collectives and updates, with the stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.remote import remote_device
from tests.numerics.training import config, micro_batch


def ranges(stage: int, offload: bool) -> set[str]:
    """Names of the ranges in one step, without the counts of torch's own."""
    settings: dict[str, Any] = config(stage, 1, clip=0.0)
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with remote_device("prompt"):
        engine = initialize(model=make("plain"), config=settings)[0]
        for step in range(3):
            engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size())))
            engine.step()
        engine.synchronize()
        everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, experimental_config=everywhere) as profile:
            engine.backward(engine(*micro_batch(3, 0, dist.get_rank(), dist.get_world_size())))
            engine.step()
            engine.synchronize()
        engine.destroy()
    return {event.key for event in profile.key_averages() if event.key.startswith("zero")}


@pytest.mark.parametrize(
    ("stage", "offload", "work"),
    [
        (3, False, {"all_gather", "all_gather_wait", "reduce_scatter", "reduce_wait", "update"}),
        (2, True, {"all_gather", "download", "reduce_scatter", "reduce_wait", "update", "upload"}),
    ],
)
def test_each_units_work_is_a_range(ranks, stage, offload, work):
    for found in ranks(2).run(ranges, stage, offload):
        names = {name.partition(": ")[2] for name in found}
        assert {name.partition(":")[0] for name in found} >= {f"zero{stage}.{one}" for one in work}
        assert any(name.startswith("blocks.0/") for name in names), names
