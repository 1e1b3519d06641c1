"""The newest values of figures of which the state has else only the last one: for a short curve beside it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

from runtime.wire.messages import StepResult
from runtime.wire.node import NodeStats

KEPT = 32
"""Values of each, however long the run is."""
GPU_FIELDS = ("utilization_percent", "power_w", "temperature_c")
"""Fields of GpuStats that are kept."""


class Histories:
    """The step times of each rank, and GPU_FIELDS of each GPU that nodes report. A screen that comes late has them from
    then on."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._gpus: dict[tuple[str, str, str], deque[float]] = {}
        """By (host, UUID, field)."""

    def copy(self) -> Histories:
        """An independent copy."""
        other = Histories()
        other._steps = {rank: copy.copy(values) for rank, values in self._steps.items()}
        other._gpus = {gpu: copy.copy(values) for gpu, values in self._gpus.items()}
        return other

    def step_ended(self, result: StepResult) -> None:
        """Take a step of a rank."""
        self._steps.setdefault(result.rank, deque(maxlen=KEPT)).append(result.step_ms)

    def node_said(self, node: NodeStats) -> None:
        """Take what a node says of its GPUs; those that it has no longer are forgotten."""
        there = {_plain(gpu.uuid): gpu for gpu in node.gpus or ()}
        for gone in [key for key in self._gpus if key[0] == node.host and key[1] not in there]:
            del self._gpus[gone]
        for uuid, gpu in there.items():
            for field in GPU_FIELDS:
                value = getattr(gpu, field)
                if value is not None:
                    self._gpus.setdefault((node.host, uuid, field), deque(maxlen=KEPT)).append(value)

    def begin_attempt(self) -> None:
        """All ranks are new processes."""
        self._steps.clear()

    def step_ms(self, rank: int) -> Sequence[float]:
        """The times of the rank's newest steps, oldest first."""
        return self._steps.get(rank, ())

    def of_gpu(self, host: str, uuid: str, field: str) -> Sequence[float]:
        """The newest values of one of GPU_FIELDS, oldest first."""
        return self._gpus.get((host, _plain(uuid), field), ())


def _plain(uuid: str) -> str:
    return uuid.removeprefix("GPU-")
