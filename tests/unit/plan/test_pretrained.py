"""What a plan says of a Hugging Face model, from its files' headers alone: the units that the engine cuts, and the
activations that autograd keeps."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.config import Resolved, load
from runtime.config.presets import ModelError
from runtime.models.causal_lm import CausalLM
from runtime.plan.decoder import layer_bytes
from runtime.plan.estimate import activation_bytes, evaluation_bytes
from runtime.plan.pretrained import Pretrained, pretrained
from runtime.zero.cut import cut
from tests.harness import huggingface
from tests.harness.peak_bytes import peak_bytes

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

TOKENS, ROWS = 64, 2


class Wrapper(nn.Module):
    """Adds the prefix of the trainer's wrapper to names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> None: ...


@functools.cache
def saved(kind: str, **changes: Any) -> tuple[Any, str]:
    """A tiny model, and the folder that it is saved in for as long as this process lives."""
    model = huggingface.build(kind, **changes)
    folder = tempfile.TemporaryDirectory(prefix="zerotop-model-")
    _folders.append(folder)
    model.save_pretrained(folder.name)
    return model, folder.name


_folders: list[Any] = []


def resolved(folder: str, small_below: int = 0, **section: Any) -> Resolved:
    model = {"path": folder, **section.pop("model", {})}
    data = {"files": ["chats.jsonl"], "seq_len": TOKENS, **section.pop("data", {})}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": small_below},
        "zerotop": {"model": model, "data": data, **section},
    }
    return load(config).resolve(2, "cpu")


def planned(folder: str, small_below: int = 0, **section: Any) -> Pretrained:
    return pretrained(resolved(folder, small_below, **section), Path())


def with_adapters(model: Any, config: Resolved) -> Any:
    pytest.importorskip("peft")
    from runtime.models.lora import add_adapters

    assert config.zerotop.lora is not None
    return add_adapters(copy.deepcopy(model), config.zerotop.lora)


def cut_sizes(model: nn.Module, config: Resolved) -> list[tuple[str, int, int]]:
    """(unit, trained elements, frozen elements) as the engine cuts the model in the trainer's wrapper."""
    patterns = list(config.zerotop.units) if config.zerotop.units else None
    return [
        (
            unit.name,
            sum(p.numel() for _, p in unit.parameters if p.requires_grad),
            sum(p.numel() for _, p in unit.parameters if not p.requires_grad),
        )
        for unit in cut(Wrapper(model), patterns, config.persistence_threshold)
    ]


# ---- units: exact ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", huggingface.KINDS)
def test_units_are_those_of_the_engine(kind: str) -> None:
    model, folder = saved(kind)
    for small_below in (0, 500, 3000):
        config = resolved(folder, small_below)
        found = pretrained(config, Path())
        assert [tuple(unit) for unit in found.units] == cut_sizes(model, config)
        assert set(found.arrivals) == {unit.name for unit in found.units}


@pytest.mark.parametrize("patterns", [["*.layers.*"], ["*.embed_tokens", "*.mlp"]])
def test_units_that_the_config_names(patterns: list[str]) -> None:
    for kind in ("llama", "qwen3", "mixtral"):
        model, folder = saved(kind)
        config = resolved(folder, 500, units=patterns)
        assert [tuple(unit) for unit in pretrained(config, Path()).units] == cut_sizes(model, config)
    with pytest.raises(ModelError, match=r"zerotop.units: no module is called 'layer\.\*'; the model has 'model'"):
        planned(folder, units=["layer.*"])


def test_a_model_of_one_block_is_one_unit() -> None:
    model, folder = saved("llama", num_hidden_layers=1)
    assert [tuple(unit) for unit in planned(folder).units] == cut_sizes(model, resolved(folder)) != []


LORA: list[tuple[str, dict[str, Any]]] = [
    # peft takes DeepSeek's dense layers and shared experts for parts of the fused ones, and gives them no adapters
    *((kind, {"r": 4}) for kind in huggingface.KINDS if kind != "deepseek-v3"),
    ("llama", {"r": 3, "target_modules": ["q_proj", "mlp.down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"r": 3, "target_modules": ["lm_head", "v_proj"]}),
    ("llama", {"r": 3, "target_modules": ["embed_tokens"]}),
    ("qwen3", {"r": 4, "modules_to_save": ["lm_head"]}),  # tied
    ("mixtral", {"r": 2, "target_modules": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}),
    ("gpt2", {"r": 2, "target_modules": ["c_attn"]}),
]


@pytest.mark.parametrize(("kind", "lora"), LORA, ids=lambda value: value if isinstance(value, str) else "")
def test_adapters_are_those_of_peft(kind: str, lora: dict[str, Any]) -> None:
    model, folder = saved(kind)
    for small_below in (0, 200):
        config = resolved(folder, small_below, lora=lora)
        assert [tuple(unit) for unit in pretrained(config, Path()).units] == cut_sizes(
            with_adapters(model, config), config
        )


def test_names_that_match_nothing_are_refused() -> None:
    _, folder = saved("llama")
    with pytest.raises(ModelError, match="target_modules: the model has no linear module named 'query': expected some"):
        planned(folder, lora={"target_modules": ["query"]})
    with pytest.raises(ModelError, match="modules_to_save: the model has no module named 'head'"):
        planned(folder, lora={"modules_to_save": ["head"]})


def test_new_tokens_add_rows_to_both_tables() -> None:
    _, folder = saved("llama")
    tokenizer = Path(folder, "tokenizer.json")
    tokenizer.write_text('{"model": {"vocab": {"a": 0, "b": 63}}, "added_tokens": [{"id": 64}]}')
    try:
        more = planned(folder, model={"new_tokens": ["<x>", "<y>"]})
    finally:
        tokenizer.unlink()
    sizes, plain = sizes_of(more), sizes_of(planned(folder))
    assert sizes["embedding"] - plain["embedding"] == sizes["head"] - plain["head"] == 3 * 32


def sizes_of(model: Pretrained) -> dict[str, int]:
    return {unit.name: unit.trained for unit in model.units}


# ---- activations: estimates ------------------------------------------------------------------------------------------
def kept_bytes(model: Any, packed: bool) -> int:
    """Bytes that autograd keeps of a forward, parameters and what is shared with them left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    edges = (40, TOKENS - 40) if packed else (TOKENS,)
    positions = torch.cat([torch.arange(length) for length in edges]).repeat(ROWS, 1)
    tokens = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = base.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "lora", "tolerance"),
    [
        ("llama", None, 0.01),
        ("qwen3", None, 0.01),
        ("gemma3", None, 0.01),
        ("gpt2", None, 0.02),
        ("qwen3-moe", None, 0.02),
        ("mixtral", None, 0.02),
        ("llama", {"r": 4}, 0.01),
        ("qwen3", {"r": 4, "target_modules": ["q_proj", "v_proj"]}, 0.01),
        ("llama", {"r": 4, "dropout": 0.1, "target_modules": ["up_proj", "q_proj"]}, 0.01),
        ("qwen3-moe", {"r": 4}, 0.02),
    ],
)
def test_activations_of_a_block_are_what_autograd_keeps(
    kind: str, lora: dict[str, Any] | None, tolerance: float, packed: bool, dtype: torch.dtype
) -> None:
    """The difference between models of two and of three blocks."""
    kept, folder = [], ""
    section: dict[str, Any] = {"data": {"packing": packed}} | ({"lora": lora} if lora else {})
    for layers in (2, 3):
        more = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
        model, folder = saved(kind, **more)
        if lora:
            model = with_adapters(model, resolved(folder, **section))
        model = copy.deepcopy(model).to(dtype)
        if kind == "gpt2":  # whose dropout makes its attention another one
            model.eval()
        kept.append(kept_bytes(model, packed))
    shape = planned(folder, **section).shape
    assert shape is not None and shape.layers == 3
    estimate = ROWS * TOKENS * layer_bytes(shape, TOKENS, dtype.itemsize)
    estimate += ROWS * TOKENS * shape.kept.dropped * (dtype.itemsize - 1)  # dropout's mask, which is of bools on a GPU
    assert estimate == pytest.approx(kept[1] - kept[0], rel=tolerance)
    assert kept[1] < activation_bytes(shape, ROWS, TOKENS, dtype.itemsize)


@pytest.mark.parametrize("method", ["chunked", "whole"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_an_evaluation_takes_at_most_what_the_forecast_says(kind: str, method: str) -> None:
    model, folder = saved(kind)
    shape = planned(folder).shape
    assert shape is not None
    causal = CausalLM(model, method=method)  # type: ignore[arg-type]
    tokens = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).repeat(ROWS, 1)
    causal.eval()

    @torch.no_grad()
    def evaluate() -> None:
        causal(tokens, tokens, positions)

    evaluate()
    took, forecast = peak_bytes(evaluate), evaluation_bytes(shape, ROWS, TOKENS, 4, method == "chunked")
    assert 0.25 * forecast < took <= forecast
