"""The plan's figures that a rank sends to the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.config import load
from runtime.diagnose.planned import planned_memory
from runtime.plan.constants import SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS
from runtime.plan.workload import built_in_workload
from runtime.wire.messages import PlannedMemory

SLOTS = SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES


def planned(device: str = "cpu", whole: bool = True, **zero: Any) -> PlannedMemory:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2} | zero,
        "zerotop": {"model": {"preset": "gpt-small"}, "data": {"tokenizer": "bytes"}, "checkpoint": {"interval": 0}},
    }
    resolved = load(config).resolve(2, device)  # type: ignore[arg-type]
    workload = built_in_workload(resolved, Path())
    assert workload is not None
    found = planned_memory(workload, resolved, builds_whole=whole)
    assert found.build_bytes == (4 * workload.parameters if whole else 0)
    assert found.consolidated_bytes == workload.element_bytes * workload.parameters
    return found


def test_on_a_cpu_offloaded_states_are_in_the_same_memory_and_on_a_gpu_they_are_not() -> None:
    plain = planned().device_bytes["optimizer"]
    on_host = {"offload_optimizer": {"device": "cpu"}}
    assert planned(**on_host).device_bytes["optimizer"] == plain > 0
    assert "optimizer" not in planned("cuda", **on_host).device_bytes
    assert planned("cuda").device_bytes["optimizer"] == plain


def test_a_checkpoint_can_be_asked_for_without_an_interval_and_offloaded_states_need_slots_alone() -> None:
    found = planned(whole=False)
    assert found.checkpoint_bytes > SLOTS == found.checkpoint_slots_bytes
    assert planned("cuda", offload_optimizer={"device": "cpu"}).checkpoint_bytes == SLOTS


def test_the_comparison_is_that_of_the_layout() -> None:
    found = planned()
    assert found.saved_bytes > 0 and found.comparison.startswith("ZeRO saves ") and "stage 2" in found.comparison
    assert found.shape_known and found.device_bytes["activations"] > 0
