"""`deepspeed.utils.zero_to_fp32`: the fp32 weights of a checkpoint as one state_dict, in one process, with no engine.
`zerotop export` writes folders for Hugging Face's libraries.

Tied parameters are in a checkpoint once; here they have all of their names again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.reading import CheckpointReader, Stored
from runtime.utils.deepspeed_files import get_model_state_file, get_model_state_files, get_optim_files

__all__ = [
    "LazyTensor",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in the checkpoint. `contiguous()` reads it."""

    reader: CheckpointReader
    stored: Stored

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        """fp32 for every floating tensor."""
        return torch.float32 if self.stored.dtype.is_floating_point else self.stored.dtype

    @property
    def nbytes(self) -> int:
        return self.stored.numel * self.dtype.itemsize

    def contiguous(self) -> torch.Tensor:
        return self.reader.read(self.stored, self.dtype)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """Parameters and persistent buffers of CHECKPOINT_DIR/TAG (default: the newest complete one) in host memory, the
    parameters in fp32 from their masters.

    lazy_mode: values are `LazyTensor`. Raises CheckpointError where there is no checkpoint, or a damaged one.
    """
    reader = CheckpointReader(_checkpoint(Path(checkpoint_dir), tag))
    frozen = set(reader.manifest.frozen) if exclude_frozen_parameters else set()
    lazy = {stored.name: LazyTensor(reader, stored) for stored in reader.tensors if stored.name not in frozen}
    lazy |= {name: lazy[known] for name, known in reader.manifest.tied.items() if known in lazy}
    return dict(lazy) if lazy_mode else _read(lazy)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """The same, as files in OUTPUT_DIR: pytorch_model.bin, or model.safetensors with safe_serialization; in numbered
    files with an index where one would be larger than max_shard_size. Memory holds one file at a time."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters, lazy_mode=True)
    files = list(_cut(state, _bytes_of(max_shard_size)))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if safe_serialization else ("pytorch_model", ".bin")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        name = f"{stem}{suffix}" if len(files) == 1 else f"{stem}-{number:05d}-of-{len(files):05d}{suffix}"
        _save(_read({key: state[key] for key in names}), folder / name, safe_serialization)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load_state_dict_from_zero_checkpoint(model: M, checkpoint_dir: str | Path, tag: str | None = None) -> M:
    """`model`, moved to the CPU, with the checkpoint's weights. For a model that no engine holds."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def _checkpoint(folder: Path, tag: str | None) -> Path:
    """Also for who names the checkpoint itself."""
    if tag is not None:
        return folder / str(tag)
    newest = checkpoint.newest(folder)
    if newest is None and not (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a folder that engine.save_checkpoint() has written to; there is no complete "
            "checkpoint in it"
        )
    return newest or folder


def _read(lazy: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    """What is one tensor under two names stays one."""
    tensors: dict[int, torch.Tensor] = {}
    for tensor in lazy.values():
        if id(tensor) not in tensors:
            tensors[id(tensor)] = tensor.contiguous()
    return {name: tensors[id(tensor)] for name, tensor in lazy.items()}


def _bytes_of(size: str | int | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if found is None or found.group(2).upper() not in _UNITS:
        raise ValueError(f'max_shard_size={size!r}: expected a size such as "5GB" or "512MiB", or a number of bytes')
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])


def _cut(state: Mapping[str, LazyTensor], limit: int | None) -> Iterator[list[str]]:
    """Names for each file, in order; a tensor that is larger than the limit has one for itself."""
    names: list[str] = []
    held = 0
    for name, tensor in state.items():
        if names and limit is not None and held + tensor.nbytes > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += tensor.nbytes
    yield names


def _save(tensors: dict[str, torch.Tensor], path: Path, safe: bool) -> None:
    if not safe:
        torch.save(tensors, path)
        return
    from safetensors.torch import save_file

    apart = {name: tensor.clone() for name, tensor in tensors.items()}  # it takes no tensor twice
    save_file(apart, str(path), metadata={"format": "pt"})
