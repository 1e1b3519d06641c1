"""Where a model's initial values come from: its own memory, rank 0's, a file, or reset_parameters()."""

from __future__ import annotations

import logging

import torch
from torch import nn

from runtime.config import ConfigError
from runtime.models.names import plain_name
from runtime.models.weights import Weights
from runtime.zero.absent import WEIGHTS_MARK

log = logging.getLogger("runtime.setup")


class Values:
    """Initial values by parameter. Ranks other than 0 have them only where a file does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._stored: dict[nn.Parameter, tuple[Weights, str]] = {}
        """Where a file has the values, and under which name."""
        self._owners: dict[nn.Parameter, nn.Module] = {}
        """Whose reset_parameters() draws the values; on rank 0."""
        self._drawn: dict[nn.Parameter, torch.Tensor] = {}
        """Of meta parameters, until they are read."""
        self._random_state: torch.Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, rank: int) -> Values:
        """Raises ConfigError where a parameter has no values at all, before anything is changed."""
        values = cls(rank)
        for path, parameters in _under_weights(module).items():
            values._find(module, Weights.open(path), parameters)
        if rank == 0:
            for path, owner in module.named_modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None and parameter.is_meta and not values._has(parameter):
                        values._owners[parameter] = _lora_layer(module, f"{path}.{name}") or _who_resets(
                            module, path, name
                        )
            for name, buffer in module.named_buffers():
                if buffer.is_meta:
                    raise ConfigError(
                        f"buffer {plain_name(name)} is on the meta device, so it has no values: build the model under "
                        "runtime.zero.Init(), or give the buffer its values first"
                    )
        return values

    def _has(self, parameter: nn.Parameter) -> bool:
        return parameter in self._stored or parameter in self._owners

    def _find(self, model: nn.Module, weights: Weights, parameters: dict[nn.Parameter, dict[str, nn.Module]]) -> None:
        """Note where the files have them. Adapters and few that they lack are new, and drawn; many are another
        model's."""
        stored = weights.match_names({name: tuple(p.shape) for p, owners in parameters.items() for name in owners})
        new: dict[str, tuple[nn.Parameter, nn.Module | None]] = {}
        for parameter, owners in parameters.items():
            found = next((stored[name] for name in owners if name in stored), None)
            adapters = next(filter(None, (_lora_layer(model, name) for name in owners)), None)
            if found is not None:
                self._stored[parameter] = weights, found
            elif adapters is not None:
                self._owners[parameter] = adapters
            else:
                new[next(iter(owners))] = parameter, next(filter(_resets, owners.values()), None)
        if new and len(new) >= sum(parameter in self._stored for parameter in parameters):
            raise weights.missing_error(list(new), "give the weights of this model")
        if fixed := [name for name, (_, owner) in new.items() if owner is None]:
            raise weights.missing_error(
                fixed, "give the weights of this model, or give modules with new parameters a reset_parameters()"
            )
        self._owners |= {parameter: owner for parameter, owner in new.values() if owner is not None}
        if new and self.rank == 0:
            log.warning(
                f"weights: {weights.path} lacks {len(new)} of the model's {len(parameters)} parameters; "
                f"reset_parameters() draws them: {', '.join(new)}"
            )

    def needs_broadcast(self, parameter: nn.Parameter) -> bool:
        """Whether only rank 0 is sure to have the values."""
        return parameter not in self._stored

    def read(self, name: str, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor | None:
        """(stop - start,) elements [start, stop) of the flattened parameter, on whatever device they are; None on ranks
        that don't have them."""
        if parameter in self._stored:
            weights, stored = self._stored[parameter]
            return weights.read(stored, start, stop)
        if not parameter.is_meta:
            return parameter.detach().reshape(-1)[start:stop]
        if self.rank != 0:
            return None
        if parameter not in self._drawn:
            self._draw(self._owners[parameter])
        drawn = self._drawn[parameter]
        if stop == drawn.numel():
            del self._drawn[parameter]
        return drawn.reshape(-1)[start:stop]

    def _draw(self, owner: nn.Module) -> None:
        """All that is `owner`'s to draw, from random numbers of their own: the other ranks draw nothing, and scripts
        count on equal states."""
        outside = torch.get_rng_state()
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
        self._drawn |= {p: drawn for p, drawn in _drawn(owner).items() if self._owners.get(p) is owner}
        self._random_state = torch.get_rng_state()
        torch.set_rng_state(outside)

    def buffer(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """A real tensor for a buffer that may be on the meta device: its values are rank 0's to give."""
        return torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer


def _under_weights(model: nn.Module) -> dict[str, dict[nn.Parameter, dict[str, nn.Module]]]:
    """Meta parameters by the files that they were built under (see WEIGHTS_MARK); of each its names (tied ones have
    several), and the module of each name."""
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


def _resets(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


def _lora_layer(model: nn.Module, path: str) -> nn.Module | None:
    """The layer of peft that draws the adapters at `path`; None where these are none. They are on the meta device where
    the base model is, and their own modules would draw what must begin as zero."""
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
    """Draw its values, which are real for the time being."""
    if not callable(getattr(module, "reset_lora_parameters", None)):
        module.reset_parameters()  # type: ignore[operator]
        return
    for kind in ("lora_A", "lora_embedding_A"):
        for adapter in getattr(module, kind, ()):
            module.reset_lora_parameters(adapter, True)  # type: ignore[operator]


def _who_resets(model: nn.Module, path: str, name: str) -> nn.Module:
    """The innermost module around a meta parameter that has reset_parameters()."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if _resets(module):
            return module
    raise ConfigError(
        f"parameter {plain_name('.'.join([*parts, name]))} is on the meta device and has no values: "
        f"{type(model).__name__} has no reset_parameters() there. Build the model under "
        "runtime.zero.Init(), which draws them on rank 0, or under runtime.zero.Init(weights=FILE_OR_FOLDER)"
    )


def _drawn(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """What reset_parameters() draws for the meta parameters of `module`, which stay as they are."""
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


def adopt(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """parameter.data = data, also where torch refuses it: from the meta device. The Parameter object stays the same,
    for optimizers hold it."""
    if not parameter.is_meta:
        parameter.data = data
        return
    replacement = nn.Parameter(data, requires_grad=parameter.requires_grad)
    replacement.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, replacement)
