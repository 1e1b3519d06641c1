"""The names of a transformers model's parameters in files, where they differ from those in memory.

transformers 5 holds all experts of a layer in one tensor; files have several per expert, and tools other than
transformers read only these. Its save_pretrained() reverses what from_pretrained() did; here that happens for one
tensor at a time, in memory for one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runtime.export.tensors import ExportTensor

log = logging.getLogger("runtime.export")


def as_in_files(tensors: list[ExportTensor], config: bytes | None) -> list[ExportTensor]:
    """`tensors` of the transformers model that config.json describes, as its save_pretrained() would write them.

    They stay as they are, which from_pretrained() reads, too, for models without fused experts, without transformers,
    and where one tensor in the files would be made of several in memory.
    """
    if config is None or not any(len(tensor.shape) == 3 and "expert" in tensor.name for tensor in tensors):
        return tensors
    try:
        model = _empty_model(json.loads(config))
        shapes = {tensor.name: tensor for tensor in tensors}
        whole = _reversed(model, {name: _empty(tensor) for name, tensor in shapes.items()})
        single = {name: _reversed(model, {name: _empty(tensor)}) for name, tensor in shapes.items()}
    except Exception as error:  # another library's internals, which may change in any way
        log.warning(f"the experts keep the names that transformers has in memory, as it can't name others: {error}")
        return tensors
    if {name: made.shape for each in single.values() for name, made in each.items()} != {
        name: made.shape for name, made in whole.items()
    }:
        log.warning("the experts keep the names that transformers has in memory: several tensors become one")
        return tensors
    found: list[ExportTensor] = []
    for name, made in single.items():
        found += _Parts(model, shapes[name], {part: tuple(empty.shape) for part, empty in made.items()}).tensors
    return found


class _Parts:
    """What becomes of one tensor in memory: it is read and taken apart when its first part is, and freed after the
    last."""

    def __init__(self, model: Any, whole: ExportTensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._whole = model, whole
        self._made: dict[str, torch.Tensor] = {}
        self.tensors: Sequence[ExportTensor] = [
            ExportTensor(
                name, shape, whole.dtype, whole.original_dtype, lambda name=name: self._read(name),  # type: ignore[misc]
                whole.is_parameter, whole.origin,
            )
            for name, shape in shapes.items()
        ]  # fmt: skip

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._made:
            self._made = _reversed(self._model, {self._whole.name: self._whole.read()})
        return self._made.pop(name).contiguous().clone()


def _empty(tensor: ExportTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _empty_model(config: dict[str, Any]) -> Any:
    """The model of config.json on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(described)


def _reversed(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What save_pretrained() makes of these tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return made
