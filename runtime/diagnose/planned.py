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
from runtime.plan.pretrained import pretrained
from runtime.plan.workload import Workload, pretrained_workload, workload_of
from runtime.zero.cut import Cut

log = logging.getLogger("runtime.engine")


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
