"""Initial values of parameters: from the model itself, from rank 0, from a file, or from reset_parameters()."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import nn

from runtime.config import ConfigError
from runtime.models.names import plain_name
from runtime.models.weights import ROWS_MARK, Weights
from runtime.wire.startnote import tell_start
from runtime.zero.absent import WEIGHTS_MARK

log = logging.getLogger("runtime.setup")

_ROWS_AT_ONCE = 4096
"""Rows of an embedding that are added up at once."""
TELL_S = 0.5
"""How often it is said how far the files are read."""


class Values:
    """Initial values of a model's parameters. Ranks other than 0 have only those that are in files."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._stored: dict[nn.Parameter, tuple[Weights, str]] = {}
        """Parameter -> the files that have its values, and its name there."""
        self._resetting: dict[nn.Parameter, nn.Module] = {}
        """Parameter -> the module whose reset_parameters() draws its values; on rank 0."""
        self._stored_buffers: dict[str, tuple[Weights, str]] = {}
        """Name of a persistent buffer -> the files that have its values, and its name there."""
        self._stored_rows: dict[nn.Parameter, int] = {}
        """Parameter with more rows than in its files -> the number of rows there."""
        self._mean_rows: dict[nn.Parameter, torch.Tensor] = {}
        """Such a parameter -> the mean of its stored rows, until all is read."""
        self._drawn: dict[nn.Parameter, torch.Tensor] = {}
        """Meta parameter -> its values, until they are read."""
        self._random_state: torch.Tensor | None = None
        self._read: set[nn.Parameter] = set()
        """Parameters of which something has been read from files."""
        self._told_s = 0.0

    @classmethod
    def of(cls, module: nn.Module, rank: int) -> Values:
        """Find the values of all parameters of `module`. Raises ConfigError, before anything is changed, if a parameter
        has none."""
        values = cls(rank)
        by_file = _params_by_weights_file(module)
        for path, parameters in by_file.items():
            values._find_stored(module, Weights.open(path), parameters, _buffers_of(module, path, by_file))
        if rank == 0:
            for path, owner in module.named_modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None and parameter.is_meta and not values._has(parameter):
                        values._resetting[parameter] = _lora_layer(module, f"{path}.{name}") or _resetting_module(
                            module, path, name
                        )
            for name, buffer in module.named_buffers():
                if buffer.is_meta and name not in values._stored_buffers:
                    raise ConfigError(
                        f"buffer {plain_name(name)} is on the meta device and has no values: build the model under "
                        "runtime.zero.Init(), or give the buffer its values first"
                    )
        return values

    def _has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._stored or parameter in self._resetting

    def _find_stored(
        self,
        model: nn.Module,
        weights: Weights,
        parameters: dict[nn.Parameter, dict[str, nn.Module]],
        buffers: dict[str, torch.Tensor],
    ) -> None:
        """Find `parameters` and `buffers` in the files. Buffers that they lack keep their values. Parameters that they
        lack are drawn if they are adapters or few; if they are half or more, the files are another model's."""
        self._stored_rows |= {
            p: owner.__dict__[ROWS_MARK]
            for p, owners in parameters.items()
            for owner in owners.values()
            if ROWS_MARK in owner.__dict__
        }
        shapes = {name: self._stored_shape(p) for p, owners in parameters.items() for name in owners}
        weights.convert_for(model, shapes)
        stored = weights.match_names(shapes | {plain_name(name): tuple(b.shape) for name, b in buffers.items()})
        for name in buffers:
            if (found := stored.get(plain_name(name))) is not None:
                self._stored_buffers[name] = weights, found
        new: dict[str, tuple[nn.Parameter, nn.Module | None]] = {}
        for parameter, owners in parameters.items():
            found = next((stored[name] for name in owners if name in stored), None)
            adapters = next(filter(None, (_lora_layer(model, name) for name in owners)), None)
            if found is not None:
                if parameter.is_floating_point():
                    weights.refuse_quantized(found)
                self._stored[parameter] = weights, found
            elif adapters is not None:
                self._resetting[parameter] = adapters
            else:
                new[next(iter(owners))] = parameter, next(filter(_resets, owners.values()), None)
        if new and len(new) >= sum(parameter in self._stored for parameter in parameters):
            raise weights.missing_error(list(new), "give the weights of this model")
        if fixed := [name for name, (_, owner) in new.items() if owner is None]:
            raise weights.missing_error(
                fixed, "give the weights of this model, or give modules with new parameters a reset_parameters()"
            )
        self._resetting |= {parameter: owner for parameter, owner in new.values() if owner is not None}
        if new and self.rank == 0:
            log.warning(
                f"weights: {weights.path} lacks {len(new)} of the model's {len(parameters)} parameters; "
                f"reset_parameters() draws them: {', '.join(new)}"
            )

    def needs_broadcast(self, parameter: nn.Parameter) -> bool:
        """Whether rank 0 has to send the values to the other ranks."""
        return parameter not in self._stored

    def read(self, name: str, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor | None:
        """(stop - start,) elements [start, stop) of the flattened parameter, on any device; None on ranks that don't
        have them."""
        if parameter in self._stored:
            self._tell(parameter)
            weights, stored = self._stored[parameter]
            if parameter in self._stored_rows:
                return self._read_grown(parameter, weights, stored, start, stop)
            return weights.read(stored, start, stop)
        if not parameter.is_meta:
            return parameter.detach().reshape(-1)[start:stop]
        if self.rank != 0:
            return None
        if parameter not in self._drawn:
            self._draw(self._resetting[parameter])
        drawn = self._drawn[parameter]
        if stop == drawn.numel():
            del self._drawn[parameter]
        return drawn.reshape(-1)[start:stop]

    def _tell(self, parameter: nn.Parameter) -> None:
        """Say how far the files are read."""
        if parameter in self._read:
            return
        self._read.add(parameter)
        now = time.monotonic()
        if now - self._told_s >= TELL_S:
            self._told_s = now
            tell_start(f"loading weights: {100 * len(self._read) // len(self._stored)}%")

    def _stored_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Its shape in the files."""
        shape = tuple(parameter.shape)
        return (self._stored_rows[parameter], *shape[1:]) if parameter in self._stored_rows else shape

    def _read_grown(
        self, parameter: nn.Parameter, weights: Weights, stored: str, start: int, stop: int
    ) -> torch.Tensor:
        """As `read`, of a parameter with more rows than in its files: the new ones are the mean of the stored ones, so
        that the model neither expects nor rules out the new tokens (Hewitt 2021, "Initializing New Word Embeddings for
        Pretrained Language Models")."""
        shape = self._stored_shape(parameter)
        row = math.prod(shape[1:])
        known = shape[0] * row
        parts = [weights.read(stored, start, min(stop, known))] if start < known else []
        if stop > known:
            if parameter not in self._mean_rows:
                total = torch.zeros(row, dtype=torch.float64, device="cpu")
                for first in range(0, shape[0], _ROWS_AT_ONCE):
                    last = min(first + _ROWS_AT_ONCE, shape[0])
                    total += weights.read(stored, first * row, last * row).view(-1, row).sum(0, dtype=torch.float64)
                self._mean_rows[parameter] = (total / shape[0]).float()
            begin = max(start, known)
            rows = -(-(stop - begin) // row) + 1
            new = self._mean_rows[parameter].repeat(rows)[begin % row :][: stop - begin]
            parts.append(new.to(parts[0].dtype) if parts else new)
            if stop == parameter.numel():
                del self._mean_rows[parameter]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _draw(self, owner: nn.Module) -> None:
        """Draw the values of all parameters that `owner` resets, with a random state of their own: the other ranks draw
        nothing, and the random states of all ranks must stay equal."""
        outside = torch.get_rng_state()
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
        self._drawn |= {p: drawn for p, drawn in _drawn(owner).items() if self._resetting.get(p) is owner}
        self._random_state = torch.get_rng_state()
        torch.set_rng_state(outside)

    def buffer(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """`buffer`, with the values that files have for it. If it is on the meta device and they have none, an
        uninitialised tensor that receives rank 0's values."""
        if name in self._stored_buffers:
            weights, stored = self._stored_buffers[name]
            return weights.read(stored, 0, buffer.numel()).reshape(buffer.shape).to(buffer.dtype, copy=True)
        return torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer


def _params_by_weights_file(model: nn.Module) -> dict[str, dict[nn.Parameter, dict[str, nn.Module]]]:
    """Path of the weights -> meta parameter built under them (see WEIGHTS_MARK) -> its name (tied parameters have
    several) -> the module that has it under that name."""
    marks: dict[nn.Parameter, str] = {}
    names: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                names.setdefault(parameter, {})[plain_name(f"{path}.{name}" if path else name)] = owner
                if mark := owner.__dict__.get(WEIGHTS_MARK):
                    marks.setdefault(parameter, mark)
    found: dict[str, dict[nn.Parameter, dict[str, nn.Module]]] = {}
    for parameter, mark in marks.items():
        found.setdefault(mark, {})[parameter] = names[parameter]
    return found


def _buffers_of(
    model: nn.Module, file: str, by_file: dict[str, dict[nn.Parameter, dict[str, nn.Module]]]
) -> dict[str, torch.Tensor]:
    """The buffers of the state dict, by name, whose values would be in the weights `file`: that of the parameters
    nearest to them."""
    names = {path: [plain_name(n) for owners in found.values() for n in owners] for path, found in by_file.items()}

    def nearest(name: str) -> str | None:
        if len(by_file) == 1:
            return file
        parts = plain_name(name).split(".")
        for length in range(len(parts) - 1, -1, -1):
            prefix = "".join(f"{part}." for part in parts[:length])
            if near := [path for path, all_ in names.items() if any(n.startswith(prefix) for n in all_)]:
                return near[0] if len(near) == 1 else None
        return None

    found = {}
    for path, owner in model.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                name = f"{path}.{name}" if path else name
                if nearest(name) == file:
                    found[name] = buffer
    return found


def _resets(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _lora_layer(model: nn.Module, path: str) -> nn.Module | None:
    """The peft layer that initialises the adapter parameter at `path`; None if it is not one. The adapters' own modules
    would draw values for those that must begin as zero."""
    parts = plain_name(path).split(".")
    at = next((index for index, part in enumerate(parts) if part.startswith("lora_")), None)
    if at is None:
        return None
    try:
        layer = model.get_submodule(".".join(parts[:at]))  # a compiled module answers for the one inside
    except AttributeError:
        return None
    return layer if callable(getattr(layer, "reset_lora_parameters", None)) else None


def _reset(module: nn.Module) -> None:
    """Draw the values of `module`, whose parameters are not on the meta device meanwhile."""
    if not callable(getattr(module, "reset_lora_parameters", None)):
        module.reset_parameters()  # type: ignore[operator]
        return
    for kind in ("lora_A", "lora_embedding_A"):
        for adapter in getattr(module, kind, ()):
            module.reset_lora_parameters(adapter, True)  # type: ignore[operator]


def _resetting_module(model: nn.Module, path: str, name: str) -> nn.Module:
    """The innermost module with reset_parameters() that contains the meta parameter `name` of the module at `path`."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if _resets(module):
            return module
    raise ConfigError(
        f"parameter {plain_name('.'.join([*parts, name]))} is on the meta device and has no values: "
        f"no module of {type(model).__name__} around it has reset_parameters(). Build the model under "
        "runtime.zero.Init(), which draws them on rank 0, or under runtime.zero.Init(weights=FILE_OR_FOLDER)"
    )


def _drawn(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """The values that reset_parameters() draws for the meta parameters of `module`, which stay on the meta device."""
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    real = {parameter: nn.Parameter(torch.empty_like(parameter, device="cpu")) for _, _, parameter in places}
    try:
        for owner, name, parameter in places:
            owner.register_parameter(name, real[parameter])
        _reset(module)
    finally:
        for owner, name, parameter in places:
            owner.register_parameter(name, parameter)
    return {parameter: drawn.detach() for parameter, drawn in real.items()}


def set_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Set parameter.data = data, also from the meta device, which torch refuses. The Parameter object stays the same,
    because optimizers refer to it."""
    if not parameter.is_meta:
        parameter.data = data
        return
    # nn.Parameter(data) would share the version counter of `data`, so that writes to the flat buffer behind it would
    # look like a script's.
    replacement = nn.Parameter(data.new_empty(0), requires_grad=parameter.requires_grad)
    replacement.data = data
    replacement.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, replacement)
