"""Memory by category of a trainer that is not ours, by walking over what its objects hold.

Each storage counts once, in the first category in which it is met: gradients that are views of
DistributedDataParallel's buckets count as the buckets. Of a DTensor (FSDP2) the local part counts, of a parameter that
DeepSpeed has partitioned this rank's partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runtime.wire.messages import Category

_DEEPSPEED_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
_DEEPSPEED_GRADIENTS = ("averaged_gradients", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition")
"""Attributes of DeepSpeed's ZeRO optimizers, by stage and version."""
_DEEPEST = 4


class Held:
    """Bytes by category: on the training device, and of a GPU's trainer in host memory."""

    def __init__(self, device_type: str) -> None:
        self.on_device: dict[Category, int] = {}
        self.on_host: dict[Category, int] = {}
        self._device_type = device_type
        self._seen: set[tuple[str, int]] = set()

    def add(self, category: Category, tensors: Iterable[Any]) -> None:
        """Count the storages of `tensors` that were not counted before."""
        for tensor in tensors:
            local = _local(tensor)
            if local is None or local.device.type == "meta":
                continue
            storage = local.untyped_storage()
            key = (str(local.device), storage.data_ptr())
            if not storage.nbytes() or key in self._seen:
                continue
            self._seen.add(key)
            here = self.on_device if local.device.type == self._device_type else self.on_host
            here[category] = here.get(category, 0) + storage.nbytes()


def held_by(modules: Iterable[Any], optimizers: Iterable[Any], device_type: str) -> Held:
    """What `modules` and `optimizers` hold now. It reads sizes only: nothing waits for a device."""
    held = Held(device_type)
    modules, optimizers = list(modules), list(optimizers)
    for module in modules:
        parameters = list(module.parameters())
        held.add("parameters", (_partition(parameter) for parameter in parameters))
        held.add("gradients", (parameter.grad for parameter in parameters))
        held.add("buffers", module.buffers())
    for optimizer in optimizers:
        for attribute in _DEEPSPEED_MASTERS:
            held.add("masters", _tensors(getattr(optimizer, attribute, None)))
        for attribute in _DEEPSPEED_GRADIENTS:
            held.add("gradients", _tensors(getattr(optimizer, attribute, None)))
        held.add("masters", (p for group in _groups(optimizer) for p in group.get("params", ())))
        held.add("optimizer", _tensors(getattr(optimizer, "state", None)))
        inner = getattr(optimizer, "optimizer", None)
        if inner is not None:
            held.add("optimizer", _tensors(getattr(inner, "state", None)))
    return held


def _groups(optimizer: Any) -> list[Mapping[str, Any]]:
    """Its parameter groups: parameters of no module are copies, in fp32, of those of one."""
    groups = getattr(optimizer, "param_groups", None)
    return groups if isinstance(groups, list) else []


def _partition(parameter: Any) -> Any:
    """What this rank keeps of a parameter."""
    partition = getattr(parameter, "ds_tensor", None)
    return parameter if partition is None or parameter.numel() else partition


def _local(tensor: Any) -> Any:
    """A plain tensor with this rank's part; None for what is none."""
    if tensor is None or not hasattr(tensor, "untyped_storage"):
        return None
    local = getattr(tensor, "_local_tensor", None)  # of a DTensor; to_local() would be a node of autograd's graph
    return tensor if local is None else local


def _tensors(value: Any, depth: int = 0) -> Iterator[Any]:
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        for one in list(value.values()):
            yield from _tensors(one, depth + 1)
    elif isinstance(value, list | tuple) and depth < _DEEPEST:
        for one in value:
            yield from _tensors(one, depth + 1)
