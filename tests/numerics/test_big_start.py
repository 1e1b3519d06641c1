"""Models that no rank could hold whole: built under zero.Init, on the meta device, or from safetensors."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import runtime as deepspeed
from runtime.config import ConfigError
from runtime.engine.initialize import initialize
from runtime.models import weights as weights_of_zero
from runtime.models.weights import Weights
from tests.numerics.models import Uneven, make
from tests.numerics.training import assert_equal, config, micro_batch, train_plainly, train_with_engine

STAGES = [0, 2, 3]


def built_inside(stage: int) -> dict[str, torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    with deepspeed.zero.Init(config_dict_or_path={}):
        model = make("tied")
    assert all(parameter.is_meta == (rank != 0) for parameter in model.parameters())
    state = torch.get_rng_state()
    states: list[Any] = [None] * world
    dist.all_gather_object(states, state)
    assert all(torch.equal(state, other) for other in states)
    engine = initialize(model=model, config=config(stage, 1, clip=0.5))[0]
    for step in range(20):
        engine.backward(engine(*micro_batch(step, 0, rank, world)))
        engine.step()
    whole = engine.module.state_dict()
    return {name: whole[name].clone() for name, _ in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_init_trains_as_if_every_rank_had_built_the_model(ranks, stage):
    plain = train_plainly("tied", 2, 1, clip=0.5)
    for ours in ranks(2).run(built_inside, stage):
        assert_equal(ours, plain)


def from_weights(stage: int, path: str, precision: str) -> None:
    with deepspeed.zero.Init(weights=path):
        model = Uneven()
    assert all(parameter.is_meta for parameter in model.parameters())
    before = {id(parameter) for parameter in model.parameters()}
    engine = initialize(model=model, config=config(stage, 1, clip=0.0, precision=precision))[0]
    assert {id(parameter) for parameter in model.parameters()} == before
    expected = make("plain").state_dict()
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    engine.backward(engine(*micro_batch(0, 0, dist.get_rank(), dist.get_world_size())))
    engine.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_from_safetensors(ranks, tmp_path: Path, stage, precision, prefix):
    save_file({prefix + name: value for name, value in make("plain").state_dict().items()}, tmp_path / "m.safetensors")
    ranks(2).run(from_weights, stage, str(tmp_path), precision)


def on_meta(stage: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    engine = initialize(model=model, config=config(stage, 1, clip=0.0))[0]
    whole = engine.module.state_dict()
    torch.manual_seed(0)
    for name, value in nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).state_dict().items():
        assert torch.equal(whole[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_meta_models_draw_their_values_once(ranks, stage):
    ranks(2).run(on_meta, stage)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


def without_values() -> str:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Bare())
    with pytest.raises(ConfigError, match=r"parameter 1\.gain is on the meta device") as caught:
        initialize(model=model, config=config(3, 1, clip=0.0))
    return str(caught.value)


def test_a_meta_parameter_without_values_is_everybodys_error(ranks):
    assert all("runtime.zero.Init" in text for text in ranks(2).run(without_values))


def wrong_weights(path: str) -> str:
    with deepspeed.zero.Init(weights=path):
        model = Uneven()
    with pytest.raises(ConfigError) as caught:
        initialize(model=model, config=config(3, 1, clip=0.0))
    return str(caught.value)


def test_wrong_weights_are_named(ranks, tmp_path: Path):
    values = {name: value.clone() for name, value in make("plain").state_dict().items()}
    lacking = {name: value for name, value in values.items() if name != "scale"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    other = {**values, "norm.weight": torch.ones(12)}
    save_file(other, tmp_path / "other.safetensors")
    for text in ranks(2).run(wrong_weights, str(tmp_path / "lacking.safetensors")):
        assert "lacks scale;" in text
    for text in ranks(2).run(wrong_weights, str(tmp_path / "other.safetensors")):
        assert "norm.weight has shape [12]" in text and "[13] in the model" in text
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for path, words in (("absent", "there is no file"), ("broken.safetensors", "not a safetensors"), ("", "found 3")):
        with pytest.raises(ConfigError, match=words):
            Weights.open(tmp_path / path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=4), st.data())
def test_any_range_of_any_tensor(tmp_path_factory: pytest.TempPathFactory, shape, data):
    folder = tmp_path_factory.mktemp("weights")
    numel = torch.Size(shape).numel()
    values = torch.arange(numel, dtype=torch.float32).view(shape)
    save_file({"a.x": values}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a.x": "one.safetensors"}}')
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    weights = Weights.open(folder)
    assert weights.match_names({"a.x": tuple(shape)}) == {"a.x": "a.x"}
    assert torch.equal(weights.read("a.x", start, stop), values.reshape(-1)[start:stop])


def memory_of_a_start(path: str, numel: int) -> tuple[int, int]:
    """Anonymous and shared bytes that building and starting took at most, beside the model's size."""
    gc.collect()
    weights_of_zero.REOPEN_BYTES = 1 << 20
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = status("VmRSS")
    with deepspeed.zero.Init(weights=path):
        model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(numel // 2**20)])
        model.blocks = nn.ModuleList(model)
    engine = initialize(model=model, config={**config(3, 1, clip=0.0), "zerotop": {"units": ["[0-9]*"]}})[0]
    held = engine.state.ledger.totals()["parameters"]
    return status("VmHWM") - before, held


def status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_hold_the_model_once(ranks, tmp_path: Path, world):
    """96 MB in all: each rank keeps its part of it, and at its worst a unit (4 MB) and pages of the file."""
    numel, unit = 24 * 2**20, 4 * 2**20
    values = {f"{index}.weight": torch.zeros(1024, 1024) for index in range(24)}
    save_file(values, tmp_path / "m.safetensors")
    ranks(world).run(memory_of_a_start, str(tmp_path), numel)  # libraries are loaded at their first use
    for peak, held in ranks(world).run(memory_of_a_start, str(tmp_path), numel):
        assert held == 4 * numel // world
        assert peak < held + 2.5 * unit  # states are not touched yet


def ordinary_training_inside() -> None:
    with deepspeed.zero.Init(enabled=False):
        assert not any(parameter.is_meta for parameter in make("plain").parameters())
    ours, _, _ = train_with_engine("plain", config(3, 1, clip=0.0), 2)
    assert not any(value.isnan().any() for value in ours.values())


def test_init_can_be_off(ranks):
    ranks(2).run(ordinary_training_inside)
