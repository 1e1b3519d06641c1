"""Bytes that a rank sends to others, and copies between GPU and host, per optimizer step. Torch-free."""

from __future__ import annotations

from runtime.plan.workload import Workload


def ring_bytes(size: int, world_size: int) -> int:
    """Bytes each rank sends to reduce-scatter or all-gather `size` bytes around a ring (an all-reduce is both)."""
    return size * (world_size - 1) // world_size


def sent_bytes(workload: Workload, stage: int) -> int:
    """Bytes that a rank sends per optimizer step.

    Stage 0 all-reduces the gradients; 1 reduce-scatters them and all-gathers the new parameters; 2 reduce-scatters at
    every micro-step, unless full gradients accumulate; 3 also all-gathers at every forward and every backward instead
    of after the update.
    """
    element, reduced = workload.element_bytes, workload.reduced_bytes(stage)
    small = workload.small_parameters
    reductions = (workload.accumulation if workload.shards_gradients(stage) else 1) * reduced
    per_element = {
        0: 2 * reduced,
        1: reduced + element,
        2: reductions + element,
        3: reductions + workload.accumulation * 2 * element,
    }[stage]
    regathered = (
        (2 * workload.accumulation - 1) * element * small if stage == 3 else 0
    )  # small parameters: all-gathered once per step
    frozen = sum(numel for _, numel in workload.padded_frozen) if stage == 3 else 0
    gathered = workload.accumulation * 2 * element * frozen
    return ring_bytes(per_element * workload.padded_parameters - regathered + gathered, workload.world_size)


def pcie_bytes(workload: Workload, stage: int, on_host: int, waiting: int, frozen_waiting: int) -> int:
    """Bytes copied between GPU and host per rank and optimizer step: gradients down (at every micro-step if gradients
    are sharded), new parameters up. Offloaded parameters, `waiting` trained and `frozen_waiting` others, are copied up
    for every forward and backward instead."""
    down = workload.accumulator_bytes
    if workload.shards_gradients(stage):
        down = workload.accumulation * workload.reduced_bytes(stage)
    gathers = 2 * workload.accumulation * workload.element_bytes * (waiting + frozen_waiting)
    return (down + workload.element_bytes) * on_host - workload.element_bytes * min(waiting, on_host) + gathers
