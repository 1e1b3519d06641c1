"""`zerotop export --merge`: the base model's weights with the adapters of a checkpoint added to them.

    merged = round(W + scaling * B @ A)        in fp32, rounded once, to the dtype of the export

W is read from the checkpoint if it holds the frozen weights, else from the base model's safetensors files, whose names
are kept: from_pretrained() reads what it has read before. A tensor is merged a few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.content.describe import ADAPTER_CONFIG, ADAPTER_KEY
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.reader import CheckpointReader, CheckpointTensor
from runtime.config import ConfigError
from runtime.export.adapters import ALTERNATIVE, BASE
from runtime.export.tensors import ExportTensor, dtype_of, from_checkpoint
from runtime.models.names import without_adapters
from runtime.models.weights import Weights
from runtime.state.precision import DTYPES

_FILE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""dtypes by the names that safetensors files use; a base model of others is not one that can be trained."""
_CHUNK_NUMEL = 4 << 20
"""Elements that are merged at a time, in fp32."""
_UNMERGED = ("lora_magnitude_vector", "lora_bias", "lora_A_log", "lora_xs")
_PATTERNS = (
    "alpha_pattern",
    "layer_replication",
    "megatron_config",
    "use_dora",
    "lora_bias",
    "use_bdlora",
    "velora_config",
)
"""Keys of adapter_config.json that change what adapters compute; only unset ones are known here."""


@dataclass(frozen=True)
class _Adapter:
    """delta = scaling * left @ right, with the shape of the weight."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


class Merge:
    """The tensors of the merged model. Raises CheckpointError for adapters that cannot be merged."""

    def __init__(self, reader: CheckpointReader, config: bytes | None, base: Path | None, dtype: str) -> None:
        """base: the folder with the base model's files, for a checkpoint without its frozen weights."""
        self.reader, self.dtype = reader, dtype
        self._settings = _settings(reader.path, config)
        self._adapter = str(self._settings[ADAPTER_KEY])
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self._frozen = set(reader.manifest.frozen)
        self._check()
        self.replaced = {
            self._plain(name): tensor for name, tensor in self._stored.items() if self._is_trained_weight(name)
        }
        """Name in the base model -> the trained tensor instead of it (modules_to_save, trained biases)."""
        self._layers = {self._layer_of(name): name for name in self._stored if _kind(name) in _KINDS}
        """Name of a weight in the base model -> the name of its lora_A in the checkpoint."""
        whole = not reader.manifest.excluded
        self.tensors = self._over_checkpoint() if whole else self._over_files(base)

    # ---- what the checkpoint holds -------------------------------------------------------------------------------
    def _check(self) -> None:
        for name in self._stored:
            if any(part in _UNMERGED for part in name.split(".")) or name.endswith(f".lora_B.{self._adapter}.bias"):
                raise self._refusal(f"{name} belongs to a kind of LoRA that --merge does not know")
        for key in _PATTERNS:
            if self._settings.get(key):
                raise self._refusal(f"its {ADAPTER_CONFIG} sets {key}, which --merge does not know")

    def _refusal(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"--merge: checkpoint {self.reader.path} cannot be merged: {why}. Instead, {ALTERNATIVE}"
        )

    def _plain(self, name: str) -> str:
        """The name that a parameter has in the base model."""
        at = name.find(BASE)
        return without_adapters(name[at + len(BASE) :] if at >= 0 else name)

    def _is_trained_weight(self, name: str) -> bool:
        stored = self._stored[name]
        if _kind(name) is not None or not stored.is_parameter or "original_module" in name.split("."):
            return False
        if self._adapter in name.split("."):
            return True
        return name not in self._frozen

    def _layer_of(self, name: str) -> str:
        """The weight that the lora_A of this name adapts."""
        parts = name.split(".")
        module = ".".join(parts[: next(i for i, part in enumerate(parts) if part.startswith("lora_"))])
        weight = f"{module}.base_layer.weight"
        if weight not in self.reader.manifest.shapes:
            raise self._refusal(f"{name} adapts a parameter of several experts")
        if weight not in self._frozen:
            raise self._refusal(f"{weight} was trained beside its adapters")
        return self._plain(weight)

    def _adapter_of(self, plain: str) -> _Adapter | None:
        name = self._layers.get(plain)
        if name is None:
            return None
        first, second = (
            self._read(name),
            self._read(name.replace("lora_A", "lora_B").replace("_embedding_A", "_embedding_B")),
        )
        rank, alpha = first.shape[0], float(self._settings["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        weight = name[: name.index(".lora_")] + ".base_layer.weight"
        shape = tuple(self.reader.manifest.shapes[weight])
        straight = (second.shape[0], first.shape[1])
        transposed = _kind(name) == "lora_embedding_A" or (
            straight != shape or (shape[0] == shape[1] and bool(self._settings.get("fan_in_fan_out")))
        )
        if (straight[::-1] if transposed else straight) != shape:
            raise self._refusal(f"{name} does not fit {weight} of shape {list(shape)}")
        return _Adapter(first.T, second.T, scaling) if transposed else _Adapter(second, first, scaling)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._stored:
            raise self._refusal(f"it lacks {name}")
        return self.reader.read(self._stored[name], torch.float32)

    # ---- the merged tensors --------------------------------------------------------------------------------------
    def _over_checkpoint(self) -> list[ExportTensor]:
        """All tensors of a checkpoint that holds its frozen weights, under the base model's names."""
        found = []
        for name, stored in self._stored.items():
            plain = self._plain(name)
            if _kind(name) is not None or (plain in self.replaced and self.replaced[plain] is not stored):
                continue
            if plain in self._layers and name.endswith(".base_layer.weight"):
                read = _slices_of(self.reader, stored)
                found.append(self._merged(plain, plain, stored.shape, stored.dtype, read))
            else:
                found.append(from_checkpoint(self.reader, stored, plain, self.dtype))
        return found

    def _over_files(self, base: Path | None) -> list[ExportTensor]:
        """All tensors of the base model's files; those of the checkpoint instead of, or added to, theirs."""
        if base is None:
            raise CheckpointError(
                f"--merge: checkpoint {self.reader.path} does not hold the base model's weights and does not say where "
                "they are: give their folder with --base"
            )
        try:
            weights = Weights.open(base)
            changed = {name: tuple(self._shape_of(name)) for name in (*self._layers, *self.replaced)}
            file_name = self._file_names(weights, changed)
        except ConfigError as error:
            raise CheckpointError(f"--merge: the base model's files do not fit the checkpoint: {error}") from None
        plain_of = {stored: plain for plain, stored in file_name.items()}
        kept = {self._plain(name) for name in self.reader.manifest.buffers or {}}
        found = []
        for stored in weights.names:
            plain = plain_of.get(stored)
            if plain in self.replaced:
                found.append(from_checkpoint(self.reader, self.replaced[plain], stored, self.dtype))
                continue
            shape, in_file = weights.stored_shape(stored), _FILE_DTYPES[weights.stored_dtype(stored)]
            computed = (
                in_file if stored in kept or not in_file.is_floating_point else DTYPES[self.reader.manifest.precision]
            )

            def read(start: int, stop: int, stored: str = stored) -> torch.Tensor:
                return weights.read_stored(stored, start, stop)

            found.append(self._merged(stored, plain, shape, computed, read))
        return found

    def _shape_of(self, plain: str) -> list[int]:
        shapes = self.reader.manifest.shapes
        return next(shape for name, shape in shapes.items() if _kind(name) is None and self._plain(name) == plain)

    def _file_names(self, weights: Weights, changed: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Name in the base model -> name in its files, of every tensor that the checkpoint changes."""
        found = weights.match_names(changed)
        tied = {self._plain(other): self._plain(name) for other, name in self.reader.manifest.tied.items()}
        lacking = [name for name in changed if name not in found and tied.get(name) not in found]
        if lacking:
            raise weights.missing_error(lacking, "give the folder of the model that was trained with --base")
        return found

    def _merged(
        self,
        name: str,
        plain: str | None,
        shape: tuple[int, ...],
        computed: torch.dtype,
        read: Callable[[int, int], torch.Tensor],
    ) -> ExportTensor:
        """The base tensor `read(start, stop)` with its adapter, if it has one."""
        dtype = dtype_of(self.dtype, computed)
        numel, row = math.prod(shape), max(1, math.prod(shape[1:]))
        step = max(1, _CHUNK_NUMEL // row) * row

        def merged() -> torch.Tensor:
            adapter = None if plain is None else self._adapter_of(plain)
            whole = torch.empty(numel, dtype=dtype)
            for start in range(0, numel, step):
                stop = min(start + step, numel)
                values = read(start, stop)
                if adapter is not None:
                    rows = adapter.left[start // row : stop // row]
                    values = values.float().add_((rows @ adapter.right).reshape(-1), alpha=adapter.scaling)
                whole[start:stop] = values
            return whole.view(shape)

        return ExportTensor(name, shape, dtype, computed, merged, origin=name)


_KINDS = ("lora_A", "lora_embedding_A")


def _kind(name: str) -> str | None:
    """The part of a name that says what an adapter's tensor is; None for others."""
    return next((part for part in name.split(".") if part.startswith("lora_")), None)


def _slices_of(reader: CheckpointReader, stored: CheckpointTensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: reader.read_slice(stored, start, stop)


def _settings(path: Path, config: bytes | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    try:
        settings: dict[str, Any] = json.loads(config or b"{}")
        if settings["peft_type"] != "LORA":
            raise CheckpointError(
                f"--merge: checkpoint {path} has adapters of type {settings['peft_type']}: {ALTERNATIVE}"
            )
        float(settings["lora_alpha"])
        return settings | {ADAPTER_KEY: settings[ADAPTER_KEY]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"--merge: checkpoint {path} has no usable {ADAPTER_CONFIG} ({type(error).__name__}: {error}): "
            f"{ALTERNATIVE}"
        ) from None
