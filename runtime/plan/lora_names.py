"""LoRA by names and shapes: which parameters of a model get adapters, and how large these are. Torch-free.

For a linear layer with `in` inputs and `out` outputs the adapters are lora_A (r, in) and lora_B (out, r); for a
parameter with the matrices of E experts they are (r E, in) and (out, r E) (peft's target_parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.config.presets import ModelError
from runtime.plan.decoder import Kept
from runtime.plan.named_units import Param, runs_before

if TYPE_CHECKING:
    from runtime.config.finetune import LoraConfig

PREFIX = "base_model.model."
"""What peft's wrapper adds in front of the wrapped model's names."""
_ROUTERS = ("gate", "router")
"""Names of modules that choose experts: they hold a matrix but are no linear layers."""


def add_adapters(parameters: Sequence[Param], config: LoraConfig, head: str) -> list[Param]:
    """The parameters of the model in peft's wrapper, in forward order: its own frozen, those of adapters and of
    `modules_to_save` trained. head: the path of the head.

    Raises ModelError for a name that matches nothing.
    """
    targets = _targets(parameters, config, head)
    saved = {one.name for one in parameters if _is_saved(one, config, head)}
    for wanted in config.modules_to_save:
        if not any(_inside(name, wanted) for one in parameters for name in (one.name, one.also) if name):
            raise ModelError(f"zerotop.lora.modules_to_save: the model has no module named {wanted!r}")
    found: list[Param] = []
    for one in parameters:
        also = PREFIX + one.also if one.also else ""
        found.append(Param(PREFIX + one.name, one.shape, trained=False, also=also))
        if one.name in saved:
            found.append(Param(_copy(one.name), one.shape, also=_copy(one.also) if one.also else ""))
        if one.name in targets:
            found += _adapters(one, config.r)
    return found


def _adapters(one: Param, r: int) -> Iterator[Param]:
    module = PREFIX + _module(one)
    experts = one.shape[0] if len(one.shape) == 3 else 1
    out_features, in_features = one.shape[-2:]
    yield Param(f"{module}.lora_A.default.weight", (r * experts, in_features))
    yield Param(f"{module}.lora_B.default.weight", (out_features, r * experts))


def _copy(name: str) -> str:
    """The name of the copy of `name` that peft trains."""
    module, _, kind = name.rpartition(".")
    return f"{PREFIX}{module}.modules_to_save.default.{kind}"


def _module(one: Param) -> str:
    """What `target_modules` calls it: the module, or the parameter itself if it holds several experts."""
    return one.name if len(one.shape) == 3 else one.name.rpartition(".")[0]


def _targets(parameters: Sequence[Param], config: LoraConfig, head: str) -> set[str]:
    """Names of the weights that get adapters."""
    able = [one for one in parameters if _is_able(one)]
    if config.target_modules == "all-linear":
        linear = (one for one in able if len(one.shape) == 2 and not runs_before(_module(one)))
        return {one.name for one in linear if head not in (_module(one), one.also.rpartition(".")[0])}
    found = set()
    for wanted in config.target_modules:
        matching = {one.name for one in able if _matches(_module(one), wanted)}
        if not matching:
            names = dict.fromkeys(_module(one).rpartition(".")[2] for one in able)
            raise ModelError(
                f"zerotop.lora.target_modules: the model has no linear module named {wanted!r}: expected some of "
                f'{", ".join(list(names)[:12])}, or "all-linear"'
            )
        found |= matching
    return found


def _is_able(one: Param) -> bool:
    if len(one.shape) == 3:
        return "expert" in one.name
    return len(one.shape) == 2 and one.name.endswith(".weight") and _module(one).rpartition(".")[2] not in _ROUTERS


def _is_saved(one: Param, config: LoraConfig, head: str) -> bool:
    """Whether a copy of the parameter is trained. peft trains one copy of tied weights, whichever of them is named."""
    names = [one.name] + ([one.also, f"{head}.weight"] if one.also else [])
    return any(_inside(name, wanted) for name in names for wanted in config.modules_to_save)


def _inside(name: str, wanted: str) -> bool:
    """Whether the parameter `name` is in a module called `wanted`, or whose name ends so."""
    parts = name.split(".")
    return any(_matches(".".join(parts[:depth]), wanted) for depth in range(1, len(parts)))


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


# ---- what backward keeps ---------------------------------------------------------------------------------------------
def kept_with_adapters(parameters: Sequence[Param], block: str, config: LoraConfig, head: str) -> Kept:
    """Which inputs backward keeps in the block whose parameters' names begin with `block`."""
    targets = _targets(parameters, config, head)
    inside = [one for one in parameters if one.name.startswith(block)]
    chosen = [one for one in inside if one.name in targets]
    whole = [one for one in inside if _is_saved(one, config, head)]
    reads = {_reads(one) for one in whole} | ({_reads(one) for one in chosen} if not config.dropout else set())
    return Kept(
        attention="attention" in reads,
        feed="feed" in reads,
        down="down" in reads,
        experts="experts" in reads,
        norms=any(len(one.shape) == 1 for one in whole),
        adapters=sum(config.r for one in chosen if len(one.shape) == 2),
        dropped=sum(one.shape[-1] for one in chosen) if config.dropout else 0,
    )


def _reads(one: Param) -> str:
    """The field of Kept for the input of the weight `one`."""
    path = one.name.split(".")
    last = _module(one).rpartition(".")[2]
    if "experts" in path:
        return "experts"
    if any("attn" in part or "attention" in part for part in path):
        return "output" if last in ("o_proj", "c_proj", "out_proj", "dense") else "attention"
    down = ("down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h")
    return "down" if last in down else "feed"
