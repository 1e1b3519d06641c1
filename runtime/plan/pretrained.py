"""What a Hugging Face model takes: its units and its shape, from its files' headers and its config. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.config.presets import ModelError
from runtime.config.vocab import count_tokens
from runtime.plan.decoder import AttentionMemory, DecoderShape, NormKind
from runtime.plan.flops import ActiveWeights, named_weights
from runtime.plan.lora_names import add_adapters, kept_with_adapters
from runtime.plan.model_files import ModelFiles, Shape, read_model
from runtime.plan.named_units import NamedUnit, Param, cut_names, runs_before

if TYPE_CHECKING:
    from runtime.config import Resolved

WRAPPER = "model."
"""What the trainer's wrapper (runtime/models/causal_lm.py) adds in front of the model's names."""
_EXPERT = re.compile(r"(?P<experts>.*\bexperts)(\.\d+)?\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_DOWN = ("down_proj", "w2")
_GATES = ("gate_proj", "gate_up_proj", "w1", "ffn_gate")
_POSITIONS = ("wpe", "position")
"""Parts of names of embeddings of positions."""
_OTHER_MIXERS = ("kv_a_proj_with_mqa", "A_log", "conv1d", "time_mix")
"""Modules and parameters of latent attention, state-space models and linear attention, which are not estimated."""
_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Pretrained:
    """A model as the engine will cut it."""

    name: str
    units: tuple[NamedUnit, ...]
    arrivals: tuple[str, ...]
    """The unit of each trained parameter, in the order in which backward makes their gradients."""
    shape: DecoderShape | None
    """None: its config.json does not say enough."""
    largest: int
    """Elements of the largest trained parameter."""
    tied_table: int
    """Elements of a trained embedding that the head shares; 0: there is none."""
    trains_head: bool
    """Whether the head's weight is trained."""
    weights: ActiveWeights | None = None
    """The weights that a token is multiplied with; None where `shape` is."""
    adapts_head: bool = False
    """Whether the head has adapters. Its logits then exist as a whole."""


def pretrained(resolved: Resolved, base: Path, folder: Path | None = None) -> Pretrained:
    """The model of zerotop.model.path, with zerotop.lora's adapters. base: where relative paths start. folder: where
    its files are, if that is known. Raises ModelError if they are not on this machine or cannot be read."""
    section, lora = resolved.zerotop.model, resolved.zerotop.lora
    assert section.path is not None
    files = read_model(str(folder) if folder else section.path, base, section.revision)
    config = text_config(files.config)
    own, head = _parameters(files, config)
    if section.new_tokens:
        own = _resized(own, head, count_tokens_of(resolved, files, base) + len(section.new_tokens))
    shape = _shape(config, own, head, _attention(resolved, config))
    parameters = own
    if lora is not None:
        parameters = add_adapters(own, lora, head)
        if shape is not None:
            block = next(one.name for one in own if _INDEX.search(one.name))
            block = block[: _INDEX.search(block).end()]  # type: ignore[union-attr]
            shape = replace(shape, kept=kept_with_adapters(own, block, lora, head))
    parameters = [
        replace(one, name=WRAPPER + one.name, also=WRAPPER + one.also if one.also else "") for one in parameters
    ]
    units, arrivals = cut_names(parameters, resolved.zerotop.units, resolved.persistence_threshold)
    trained = [one for one in parameters if one.trained]
    return Pretrained(
        name=files.path.name if Path(base, Path(section.path).expanduser()).exists() else section.path,
        units=tuple(units),
        arrivals=arrivals,
        shape=shape,
        largest=max((one.numel for one in trained), default=0),
        tied_table=next((one.numel for one in trained if one.also), 0),
        trains_head=any(f".{head}." in f".{name}" for one in trained for name in (one.name, one.also)),
        weights=None if shape is None else named_weights(parameters, shape, head),
        adapts_head=any(f".{head}.lora_A." in one.name for one in trained),
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def count_tokens_of(resolved: Resolved, files: ModelFiles, base: Path) -> int:
    """Tokens of the tokenizer, without those that zerotop.model.new_tokens adds; 0 if it cannot be read here."""
    named = resolved.zerotop.data.tokenizer
    folder = files.path if named == resolved.zerotop.model.path else Path(named)
    try:
        return count_tokens(str(folder), base)
    except (OSError, ValueError):
        return 0


# ---- parameters ------------------------------------------------------------------------------------------------------
def _parameters(files: ModelFiles, config: Mapping[str, Any]) -> tuple[list[Param], str]:
    """The model's parameters in forward order, as they are in memory, and the path of the head."""
    found = [Param(name, shape) for name, shape in _fused(files.tensors).items()]
    table = _table(found)
    if table is None:
        raise ModelError(f"zerotop.model.path: {files.path} has no embedding: expected a causal language model")
    heads = [one for one in found if _is_head(one, table)]
    head = heads[0].name.rpartition(".")[0] if heads else "lm_head"
    if config.get("tie_word_embeddings") or not heads:  # a model of its own head would have its weight in the files
        found = [one for one in found if one not in heads]
        found = [replace(one, also=f"{head}.weight") if one is table else one for one in found]
    return sorted(found, key=lambda one: _place(one, head)), head


def _table(parameters: Sequence[Param]) -> Param | None:
    """The embedding of tokens."""
    tables = [one for one in parameters if runs_before(one.name) and len(one.shape) == 2]
    tables = [one for one in tables if not any(word in one.name for word in _POSITIONS)]
    return max(tables, key=lambda one: one.shape[0], default=None)


def _is_head(one: Param, table: Param) -> bool:
    inside = _INDEX.search(one.name) is not None
    return one.shape == table.shape and not inside and not runs_before(one.name)


def _place(one: Param, head: str) -> tuple[int, int]:
    """The parameter's place in forward order."""
    index = _INDEX.search(one.name)
    if index is not None:
        return 1, int(index[1])
    return (0, 0) if runs_before(one.name) else (3, 0) if one.name.startswith(f"{head}.") else (2, 0)


def _fused(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors with the matrices of each block's experts stacked, as transformers has them in memory."""
    found: dict[str, Shape] = {}
    rows: dict[str, dict[str, list[Shape]]] = {}
    for stored, shape in tensors.items():
        name = stored.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's name for it before transformers 5
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[name] = shape
            continue
        part = expert["part"]
        fused = f"{expert['experts']}.{'down_proj' if part in _DOWN else 'gate_up_proj'}"
        rows.setdefault(fused, {}).setdefault(part, []).append(shape)
    for name, parts in rows.items():
        first = next(iter(parts.values()))
        count = len(first) if len(first[0]) == 2 else first[0][0]
        found[name] = (count, sum(shapes[0][-2] for shapes in parts.values()), first[0][-1])
    return found


def _resized(parameters: list[Param], head: str, tokens: int) -> list[Param]:
    """The parameters with at least `tokens` rows in embedding and head."""
    table = _table(parameters)
    assert table is not None
    names = (table.name, f"{head}.weight", f"{head}.bias")
    rows = max(table.shape[0], tokens)
    return [replace(one, shape=(rows, *one.shape[1:])) if one.name in names else one for one in parameters]


# ---- shape -----------------------------------------------------------------------------------------------------------
def _shape(
    config: Mapping[str, Any], parameters: list[Param], head: str, attention: AttentionMemory
) -> DecoderShape | None:
    """None if the config lacks the number of heads, the model has no list of blocks, or these mix tokens in another way
    than attention of queries, keys and values."""
    blocks = {int(index[1]) for one in parameters if (index := _INDEX.search(one.name))}
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    table = _table(parameters)
    if not blocks or not heads or table is None:
        return None
    dim = table.shape[1]
    inside = [one for one in parameters if (index := _INDEX.search(one.name)) and int(index[1]) == max(blocks)]
    names = {part for one in inside for part in one.name.split(".")}
    if any(name in names for name in _OTHER_MIXERS):
        return None
    experts = next((one.shape[0] for one in inside if len(one.shape) == 3), 0)
    per_token = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    feed = _number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * dim
    expert_feed = _number(config, "moe_intermediate_size") or feed
    head_dim = _number(config, "head_dim") or dim // heads
    return DecoderShape(
        layers=len(blocks),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        head_dim=head_dim,
        dim=dim,
        feed_forward=feed,
        vocab_size=table.shape[0],
        tied=bool(table.also),
        gated=any(name in names for name in _GATES),
        norms=sum(one.shape == (dim,) and one.name.endswith("weight") for one in inside),
        head_norms=any(name in names for name in ("q_norm", "k_norm")),
        norm=_norm(config, inside),
        activation_extra=3 * ("gelu_new" in (config.get("activation_function"), config.get("hidden_act"))),
        experts=experts,
        experts_per_token=per_token if experts else 0,
        expert_feed_forward=expert_feed if experts else 0,
        shared_feed_forward=_shared(config, expert_feed, names) if experts else 0,
        softcap=bool(config.get("final_logit_softcapping")),
        attention=attention,
    )


def _norm(config: Mapping[str, Any], block: Sequence[Param]) -> NormKind:
    if any("norm" in one.name or "ln_" in one.name for one in block if one.name.endswith(".bias")):
        return "layer"
    return "rms fp32" if str(config.get("model_type", "")).startswith("gemma") else "rms"


def _shared(config: Mapping[str, Any], expert_feed: int, names: set[str]) -> int:
    """Width of the experts that every token goes to."""
    if "shared_expert" in names:
        return _number(config, "shared_expert_intermediate_size") or expert_feed
    return (_number(config, "n_shared_experts") or 1) * expert_feed if "shared_experts" in names else 0


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((found for key in keys if isinstance(found := config.get(key), int) and found > 0), None)


def _attention(resolved: Resolved, config: Mapping[str, Any]) -> AttentionMemory:
    """What attention keeps with the config's implementation and data."""
    kind, data = resolved.zerotop.model.attention, resolved.zerotop.data
    if kind == "eager":
        return "eager"
    return "masked" if kind == "sdpa" and (data.packing or _slides(config, data.seq_len)) else "fused"


def _slides(config: Mapping[str, Any], seq_len: int) -> bool:
    """Whether attention has windows that are shorter than the sequences, which takes a mask, too."""
    window, kinds = _number(config, "sliding_window"), config.get("layer_types")
    slides = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    return window is not None and window < seq_len and bool(slides)
