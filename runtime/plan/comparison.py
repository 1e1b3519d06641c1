"""What a layout saves or costs on a rank's device against plain data parallelism, and why. Torch-free.

Compared is what differs between layouts: states and the engine's buffers. Activations, logits and context are the same.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.plan.memory import EXACT, Layout, data_parallel
from runtime.plan.workload import Workload
from runtime.wire.sizes import format_size

_WHY = {
    "buffers": "its buffers for all-gather and reduce-scatter take {more}",
    "masters": "the fp32 master weights beside the model's {precision} take {more}",
    "gradients": "the gradients accumulate in {accumulates}, {more} more",
    "parameters": "padding of the shards takes {more}",
    "optimizer": "the optimizer states take {more} more",
}


class Comparison(NamedTuple):
    """`saved_bytes` per rank is negative if the layout costs more; `text` is one sentence about it."""

    saved_bytes: int
    text: str


def against_data_parallel(workload: Workload, layout: Layout) -> Comparison:
    """Compare `layout` of `workload` with torch's DDP."""
    plain = data_parallel(workload)
    saved = plain.variable_bytes - layout.variable_bytes
    here, there = format_size(layout.variable_bytes), format_size(plain.variable_bytes)
    figures = f"{here} of states and buffers instead of {there}"
    if saved > 0:
        text = f"ZeRO saves {format_size(saved)} per rank against data parallelism here ({layout.label}: {figures})"
    elif saved == 0:
        text = f"ZeRO takes as much as data parallelism here ({layout.label}: {format_size(layout.variable_bytes)})"
    else:
        because = _because(workload, layout, plain)
        text = f"{layout.label} costs {format_size(-saved)} per rank more than data parallelism here, because {because}"
        text = text[0].upper() + text[1:]
    return Comparison(saved, text)


def _because(workload: Workload, layout: Layout, plain: Layout) -> str:
    """The category in which the layout takes most more than data parallelism, and why nothing makes up for it."""
    more = {name: layout.gpu[name] - plain.gpu[name] for name in (*EXACT, "buffers")}
    name = max(more, key=more.__getitem__)
    why = _WHY[name].format(
        more=format_size(more[name]), precision=workload.precision, accumulates=workload.grad_accum_dtype
    )
    if workload.world_size == 1:
        return f"one rank has nothing to shard, and {why}"
    if workload.frozen_parameters > workload.trained_parameters and layout.stage != 3:
        return f"most parameters are frozen, which stage {layout.stage} does not shard, and {why}"
    return why
