"""Where a model's initial values come from: its own memory, rank 0's, a file, or reset_parameters()."""

from __future__ import annotations

import torch
from torch import nn

from runtime.config import ConfigError
from runtime.zero.init import WEIGHTS_MARK
from runtime.zero.weights import Weights


class Values:
    """Initial values by parameter. Ranks other than 0 have them only where a file does."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.rank = rank
        self._weights: dict[nn.Parameter, Weights] = {}
        self._owners: dict[nn.Parameter, nn.Module] = {}
        self._drawn: dict[nn.Parameter, torch.Tensor] = {}
        """By reset_parameters(), of meta parameters, until they are read."""

    @classmethod
    def of(cls, module: nn.Module, rank: int) -> Values:
        """Raises ConfigError where a parameter has no values at all, before anything is changed."""
        values = cls(module, rank)
        shapes: dict[Weights, dict[str, tuple[int, ...]]] = {}
        for name, parameter in module.named_parameters():
            weights = getattr(parameter, WEIGHTS_MARK, None)
            if weights is not None and parameter.is_meta:
                values._weights[parameter] = weights
                shapes.setdefault(weights, {})[name] = tuple(parameter.shape)
        for weights, expected in shapes.items():
            weights.check(expected)
        if rank == 0:
            for path, owner in module.named_modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None and parameter.is_meta and parameter not in values._weights:
                        values._owners[parameter] = _who_resets(module, path, name)
            for name, buffer in module.named_buffers():
                if buffer.is_meta:
                    raise ConfigError(
                        f"buffer {name} is on the meta device, so it has no values: build the model under "
                        "runtime.zero.Init(), or give the buffer its values first"
                    )
        return values

    def needs_broadcast(self, parameter: nn.Parameter) -> bool:
        """Whether only rank 0 is sure to have the values."""
        return parameter not in self._weights

    def read(self, name: str, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor | None:
        """(stop - start,) elements [start, stop) of the flattened parameter, on whatever device they are; None on ranks
        that don't have them."""
        if parameter in self._weights:
            return self._weights[parameter].read(name, start, stop)
        if not parameter.is_meta:
            return parameter.detach().reshape(-1)[start:stop]
        if self.rank != 0:
            return None
        if parameter not in self._drawn:
            self._drawn |= _drawn(self._owners[parameter])
        drawn = self._drawn[parameter]
        if stop == drawn.numel():
            del self._drawn[parameter]
        return drawn.reshape(-1)[start:stop]

    def buffer(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """A real tensor for a buffer that may be on the meta device: its values are rank 0's to give."""
        return torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer


def _who_resets(model: nn.Module, path: str, name: str) -> nn.Module:
    """The innermost module around a meta parameter that has reset_parameters()."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if callable(getattr(module, "reset_parameters", None)):
            return module
    raise ConfigError(
        f"parameter {'.'.join([*parts, name])} is on the meta device and has no values: {type(model).__name__} has no "
        "reset_parameters() there. Build the model under runtime.zero.Init(), which draws them on rank 0, or under "
        "runtime.zero.Init(weights=FILE_OR_FOLDER)"
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
            owner._parameters[name] = real[parameter]
        module.reset_parameters()  # type: ignore[operator]
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter
    return {parameter: drawn.detach() for parameter, drawn in real.items()}


def adopt(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """parameter.data = data, also where torch refuses it: from the meta device. The Parameter object stays the same,
    for optimizers hold it."""
    if not parameter.is_meta:
        parameter.data = data
        return
    replacement = nn.Parameter(data, requires_grad=parameter.requires_grad)
    replacement.__dict__.update({k: v for k, v in parameter.__dict__.items() if k != WEIGHTS_MARK})
    torch.utils.swap_tensors(parameter, replacement)
