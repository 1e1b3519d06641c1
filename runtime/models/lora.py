"""Low-rank adapters around a Hugging Face model, with peft: what the config's names mean, and what they may not mean.

peft is imported inside functions: only runs with a `zerotop.lora` section need it. Under zero.Init(weights=...) the
adapters take no memory here; their values are drawn on rank 0 as peft draws them (zero/initial_values.py), so they are
the same at every world size.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from runtime.config import ConfigError
from runtime.config.finetune import LoraConfig
from runtime.process.extras import INSTALL_FINETUNING

log = logging.getLogger("runtime.models")

TARGETS_KEY = "zerotop.lora.target_modules"
SAVED_KEY = "zerotop.lora.modules_to_save"
_LISTED = 12
"""Names that an error lists at most."""


class Targets(NamedTuple):
    """What gets adapters: full names in the model."""

    modules: list[str]
    parameters: list[str]
    """Weights of fused experts, [experts, rows, columns], which are parameters of modules that are not linear."""


def add_adapters(model: Any, config: LoraConfig) -> nn.Module:
    """`model` in peft's wrapper: its own parameters frozen, adapters and `modules_to_save` trained.

    Raises ConfigError, naming the key, for a name that matches nothing or cannot have adapters, and without peft.
    """
    peft = _peft()
    targets = find_targets(model, config)
    saved = _modules_to_save(model, config)
    requires_input_grads = _requires_input_grads(model)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks transformers 5 whether it checkpoints by the old name
        wrapped: nn.Module = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                use_rslora=config.rslora,
                target_modules=targets.modules,
                target_parameters=targets.parameters or None,
                modules_to_save=saved or None,
                ensure_weight_tying=bool(saved) and _tied(model),
                fan_in_fan_out=bool(targets.modules) and not any(_is_plain(model, name) for name in targets.modules),
                bias="none",
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=False,  # the engine keeps fp32 master weights whatever the precision
        )
    if _requires_input_grads(model) and not requires_input_grads:
        # With checkpointing, peft makes the embedding's output require a gradient. Only reentrant checkpointing needs
        # that, and it costs a backward through the inputs of the first block.
        model.disable_input_require_grads()
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in wrapped.parameters())
    log.info(
        f"LoRA: adapters of rank {config.r} on {len(targets.modules) + len(targets.parameters)} modules "
        f"({', '.join(_ends(targets.modules + targets.parameters))}); {trained:,} of {total:,} parameters are trained"
    )
    return wrapped


def _requires_input_grads(model: Any) -> bool:
    """Whether the embedding's output requires a gradient although the embedding does not."""
    return bool(getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"zerotop.lora: adapters need peft ({error}): {INSTALL_FINETUNING}") from None
    return peft


# ---- names -----------------------------------------------------------------------------------------------------------
def find_targets(model: Any, config: LoraConfig) -> Targets:
    """The modules and parameters that `config.target_modules` names."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    experts = _fused_experts(model)
    if config.target_modules == "all-linear":
        if experts:
            log.warning(
                f'{TARGETS_KEY}: "all-linear" leaves out {", ".join(_ends(experts, 2))}, which hold all experts of a '
                "block in one tensor; name them there to train them, too"
            )
        return Targets(linear, [])
    able = linear + [name for name, module in model.named_modules() if module is head or type(module) is nn.Embedding]
    found: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for wanted in config.target_modules:
        modules = [name for name in able if _matches(name, wanted)]
        fused = [name for name in experts if _matches(name, wanted)]
        if not modules and not fused:
            raise _nothing_matches(model, TARGETS_KEY, wanted, able + experts)
        if (tied := next((name for name in modules if _is_tied(model, name)), None)) is not None:
            raise ConfigError(
                f"{TARGETS_KEY}: {tied} shares its weight with another module, so adapters on it could not be merged; "
                f'leave it out, or train it as a whole: "modules_to_save": ["{tied.rpartition(".")[2]}"]'
            )
        found |= dict.fromkeys(modules)
        parameters |= dict.fromkeys(fused)
    if parameters and config.dropout:
        raise ConfigError(
            f"zerotop.lora.dropout: expected 0, got {config.dropout}: peft has no dropout for the adapters of "
            f"{next(iter(parameters))}, which holds several experts; leave it out of {TARGETS_KEY}, or set 0"
        )
    return Targets(list(found), list(parameters))


def _modules_to_save(model: Any, config: LoraConfig) -> list[str]:
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for wanted in config.modules_to_save:
        if not any(_matches(name, wanted) for name in names):
            raise _nothing_matches(model, SAVED_KEY, wanted, names)
    return list(config.modules_to_save)


def _nothing_matches(model: Any, key: str, wanted: str, names: Iterable[str]) -> ConfigError:
    """The error for a name that matches no module, with the names that would, nearest first."""
    ends = _ends(names, 1 + wanted.count("."))
    nearest = sorted(ends, key=lambda name: -difflib.SequenceMatcher(None, wanted.lower(), name.lower()).ratio())
    more = f" and {len(nearest) - _LISTED} more" if len(nearest) > _LISTED else ""
    kind = "no linear module" if key == TARGETS_KEY else "no module with parameters"
    way_out = ', or "all-linear"' if key == TARGETS_KEY else ""
    return ConfigError(
        f"{key}: {type(model).__name__} has {kind} named {wanted!r}: expected some of "
        f"{', '.join(nearest[:_LISTED])}{more}{way_out}"
    )


def _matches(name: str, wanted: str) -> bool:
    """Whether `wanted` is `name` or its end, as peft compares them."""
    return name == wanted or name.endswith(f".{wanted}")


def _ends(names: Iterable[str], parts: int = 1) -> list[str]:
    """The last parts of the names, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))


# ---- what can have adapters ------------------------------------------------------------------------------------------
def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, which is linear with its weight transposed."""
    if isinstance(module, nn.Linear):
        return True
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_plain(model: nn.Module, name: str) -> bool:
    """Whether the module's weight is [outputs, inputs], unlike Conv1D's."""
    return isinstance(model.get_submodule(name), nn.Linear | nn.Embedding)


def _fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold the matrices of several experts."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]


def _tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _is_tied(model: Any, name: str) -> bool:
    module = model.get_submodule(name)
    return _tied(model) and module in (model.get_output_embeddings(), model.get_input_embeddings())
