"""The plan's workload of a model that an engine is built for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from torch import nn

from runtime.config import Resolved
from runtime.config.presets import ModelError
from runtime.models.gpt import GPT
from runtime.models.origin import origin_of
from runtime.plan import stage_layout
from runtime.plan.comparison import against_data_parallel
from runtime.plan.constants import SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS
from runtime.plan.estimate import evaluation_bytes, export_bytes
from runtime.plan.pretrained import pretrained
from runtime.plan.workload import Workload, pretrained_workload, workload_of
from runtime.wire.messages import PlannedMemory
from runtime.zero.cut import Cut

log = logging.getLogger("runtime.engine")

_INITIAL_BYTES = 4
"""Bytes of a parameter as the built-in trainer initialises it: fp32, whatever it trains in."""


def planned_workload(module: nn.Module, config: Resolved, cuts: Sequence[Cut]) -> Workload:
    """The plan's workload of `module`, in the units that it was cut into."""
    name = type(module).__name__
    units = [(cut.name, sum(p.numel() for _, p in cut.parameters if p.requires_grad)) for cut in cuts]
    frozen = [(cut.name, sum(p.numel() for _, p in cut.parameters if not p.requires_grad)) for cut in cuts]
    known_shape = isinstance(module, GPT) and module.config.max_seq_len == config.zerotop.data.seq_len
    workload = workload_of(config, name, units, module.config if known_shape else None)  # type: ignore[arg-type]
    origin = origin_of(module)
    if origin is not None and config.zerotop.model.path is not None:
        try:
            workload = pretrained_workload(config, pretrained(config, origin.folder, origin.folder))
        except ModelError as error:  # without a shape there is advice, too
            log.debug(f"the plan of {origin.path} is not known: {error}")
        known = {unit for unit, _ in units} >= set(workload.arrivals)
        arrivals = workload.arrivals if known else ()
        workload = dataclasses.replace(workload, name=name, units=tuple(units), arrivals=arrivals)
    return dataclasses.replace(workload, frozen=tuple((unit, numel) for unit, numel in frozen if numel))


def planned_memory(workload: Workload, config: Resolved, builds_whole: bool) -> PlannedMemory:
    """The plan of an engine that runs `workload`, for its hello. builds_whole: whether rank 0 builds the model in host
    memory, as zero.Init lets it do without weights."""
    world, offload = workload.world_size, config.offload_optimizer is not None
    # A checkpoint can be asked for at any time, also without an interval.
    workload = dataclasses.replace(workload, checkpoints=True)
    layout = stage_layout(workload, config.stage, offload, None if offload else config.offload_param is not None)
    compared = against_data_parallel(workload, layout)
    held = dict(layout.gpu)
    if workload.device == "cpu":  # offloaded states are in the same memory
        for name, size in layout.host.items():
            held[name] = held.get(name, 0) + size // world
    return PlannedMemory(
        device_bytes={name: size for name, size in held.items() if size},
        shape_known=workload.shape is not None,
        saved_bytes=compared.saved_bytes,
        comparison=compared.text,
        checkpoint_bytes=layout.snapshot_bytes // world,
        checkpoint_slots_bytes=SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES,
        build_bytes=_INITIAL_BYTES * workload.parameters if builds_whole else 0,
        consolidated_bytes=workload.element_bytes * workload.parameters,
        export_bytes=export_bytes(workload.element_bytes * workload.parameters, _largest_unit(workload), world),
        **_evaluation(workload, config),
    )


def _largest_unit(workload: Workload) -> int:
    return max(numel for _, numel in (*workload.units, *workload.frozen))


def _evaluation(workload: Workload, config: Resolved) -> dict[str, int]:
    """What the next evaluation takes, and how often there is one; empty without evaluations."""
    section = config.zerotop.evaluation
    if section is None or workload.shape is None:
        return {}
    need = evaluation_bytes(
        workload.shape,
        workload.micro_batch,
        workload.seq_len,
        workload.element_bytes,
        workload.chunked_loss,
        section.new_tokens if section.prompts else 0,
    )
    return {"evaluation_bytes": need, "evaluation_interval": section.interval}
