"""Checks of model, config and optimizer before an engine is built; errors are raised on every rank."""

from __future__ import annotations

import json

import torch
from torch import nn

from runtime.comm import Comm
from runtime.config import ConfigError, Resolved
from runtime.models.names import plain_name
from runtime.optim.optimizer import ZeroOptimizer

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRAINABLE = (torch.float32, torch.bfloat16)


def check_complete(module: nn.Module) -> None:
    """Raise ConfigError for lazy modules, whose parameters have no shape yet."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(
                f"{plain_name(name)} has no shape yet (a Lazy module of torch): run one forward of the model with real "
                "inputs before initialize()"
            )


def check_parameters(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer) -> None:
    """Raise ConfigError for optimizer parameters outside the model, and for dtypes and modules that cannot be
    trained."""
    names = {parameter: plain_name(name) for name, parameter in module.named_parameters()}
    foreign = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ConfigError(
            f"{foreign} parameters of the optimizer are not in the model: create the optimizer from "
            "model.parameters() after the last change to the model, and make modules with parameters of their own "
            "part of the model that initialize() gets"
        )
    for path, part in module.named_modules() if config.world_size > 1 else ():
        if isinstance(part, EMBEDDINGS) and part.max_norm is not None and part.weight.requires_grad:
            name = plain_name(f"{path}.weight".lstrip("."))
            raise ConfigError(
                f"parameter {name}: max_norm changes those rows of a trained embedding that a rank looks up, so ranks "
                "would have different weights. Create it without max_norm, and limit its rows after each step "
                "(torch.renorm) inside zero.GatheredParameters(weight, modifier_rank=0)"
            )
    for parameter, name in names.items():
        if parameter.requires_grad and parameter.is_complex():
            raise ConfigError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: expected real numbers. Make it a "
                "parameter of real and imaginary parts, and call torch.view_as_complex on it in the forward"
            )
        if config.precision == "fp32" and parameter.requires_grad and parameter.dtype not in TRAINABLE:
            raise ConfigError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: expected float32 or bfloat16; "
                'call model.float() before initialize(), or set "bf16": {"enabled": true}'
            )


def check_same_model(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm) -> None:
    """Raise ConfigError, naming the first difference, if ranks have different models, configs or optimizers, with which
    collectives would hang or train different models. Collective."""
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    mine = [
        (plain_name(name), tuple(p.shape), str(p.dtype), p.requires_grad, group_of.get(p))
        for name, p in module.named_parameters()
    ]
    mine += [
        (f"(buffer) {plain_name(name)}", tuple(b.shape), str(b.dtype), False, None)
        for name, b in module.named_buffers()
    ]
    replies = comm.gather_objects((config.to_json(), optimizer.settings(), mine))
    gathered = [(Resolved.from_json(text), described, parameters) for text, described, parameters in replies]
    first_config, first_optimizer, _ = gathered[0]
    for rank, (other, described, _) in enumerate(gathered):
        if (found := first_config.difference(other)) is not None:
            key, zeroth, theirs = found
            raise ConfigError(
                f"ranks have different configs: {key} is {json.dumps(zeroth)} on rank 0 and "
                f"{json.dumps(theirs)} on rank {rank}"
            )
        for name in [*first_optimizer, *(name for name in described if name not in first_optimizer)]:
            zeroth, theirs = first_optimizer.get(name, "missing"), described.get(name, "missing")
            if zeroth != theirs:
                raise ConfigError(
                    f"ranks have different optimizers: {name} is {zeroth} on rank 0 and {theirs} on rank {rank}"
                )
    everyone = [parameters for _, _, parameters in gathered]
    for rank, theirs in enumerate(everyone):
        if theirs == everyone[0]:
            continue
        for first, other in zip(everyone[0], theirs, strict=False):
            if first != other:
                raise ConfigError(
                    f"ranks have different models: rank 0 has parameter {_parameter(first)}, rank "
                    f"{rank} has {_parameter(other)}"
                )
        raise ConfigError(
            f"ranks have different models: rank 0 has {len(everyone[0])} parameters, rank {rank} has {len(theirs)}"
        )


def _parameter(entry: tuple[str, tuple[int, ...], str, bool, int | None]) -> str:
    name, shape, dtype, trainable, group = entry
    kind = "" if trainable else " (frozen)"
    return f"{name} {list(shape)} {dtype.removeprefix('torch.')}{kind}{'' if group is None else f' in group {group}'}"
