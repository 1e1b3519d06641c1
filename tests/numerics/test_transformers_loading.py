"""Models of transformers from their files under zero.Init: every parameter as from_pretrained() gives it, bit for bit,
also where the files have other tensors than the model; no rank reads more than it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime as deepspeed
from runtime.config import ConfigError
from runtime.engine.initialize import initialize
from runtime.models.weights import Weights
from tests.harness import huggingface
from tests.numerics.training import config


def load_all(folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in huggingface.KINDS:
        path = f"{folder}/{kind}"
        expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for stage in (0, 3):
            with deepspeed.zero.Init(weights=path):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
            assert all(parameter.is_meta for parameter in model.parameters())
            engine = initialize(model=model, config=config(stage, 1, clip=0.0))[0]
            found = engine.module.state_dict()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), (kind, stage, name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in huggingface.KINDS:
        huggingface.save(kind, folder / kind)
    return folder


def test_every_parameter_is_what_from_pretrained_gives(ranks, models):
    ranks(2).run(load_all, str(models), timeout_s=180)


class Counted(Weights):
    """Counts the elements that are read from files."""

    read_numel = 0

    def read_stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read_numel += stop - start
        return super().read_stored(name, start, stop)


def opened(model: Any, path: Path) -> tuple[Counted, dict[str, str]]:
    weights = Counted.open(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights.convert_for(model, shapes)
    return weights, weights.match_names(shapes)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_slices_of_fused_experts_are_read_from_the_experts_they_are_of(models, kind):
    model = huggingface.build(kind)
    weights, found = opened(model, models / kind)
    for name, parameter in model.named_parameters():
        numel = parameter.numel()
        for start, stop in ((0, numel), (numel // 3, numel // 2), (7, 8), (numel - 5, numel), (3, 3)):
            weights.read_numel = 0
            values = weights.read(found[name], start, stop)
            assert torch.equal(values, parameter.detach().reshape(-1)[start:stop]), (name, start, stop)
            assert weights.read_numel == stop - start


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern", "ignore::FutureWarning")  # of peft
def test_adapters_around_the_experts_do_not_hide_their_files(models):
    from peft import LoraConfig, get_peft_model

    model = huggingface.build("mixtral")
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outer = torch.nn.Module()
    outer.model = get_peft_model(model, LoraConfig(target_modules="all-linear", target_parameters=["down_proj"]))
    weights, found = opened(outer, models / "mixtral")
    for name, parameter in outer.named_parameters():
        if "lora_" in name:
            assert name not in found
        else:
            plain = name.removeprefix("model.base_model.model.").replace("base_layer.", "")
            assert torch.equal(weights.read(found[name], 0, parameter.numel()).view(parameter.shape), values[plain])


@pytest.mark.parametrize("by_rows", [True, False])
def test_any_operation_of_transformers_can_make_a_parameter(tmp_path, by_rows, monkeypatch):
    """Operations that move rows are followed; a parameter that others make is converted as a whole, and once."""
    from transformers import LlamaConfig, LlamaModel, conversion_mapping, core_model_loading
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, Transpose

    stack = [MergeModulelist(dim=0), Concatenate(dim=1), Interleave(dim=1)]
    cases = {
        True: (stack, [Chunk(dim=0)]),
        False: ([*stack, Transpose(1, 2)], [Transpose(0, 1), Chunk(dim=0)]),
    }
    experts, split = cases[by_rows]
    converters = [
        core_model_loading.WeightConverter(["experts.*.w1", "experts.*.w2"], "experts.both", experts),
        core_model_loading.WeightConverter("attention.qkv", ["attention.q", "attention.k"], split),
    ]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: converters)
    stored = {f"experts.{index}.w{w}": torch.randn(6, 8) for index in range(3) for w in (1, 2)}
    stored["attention.qkv"] = torch.randn(10, 10)
    save_file(stored, tmp_path / "model.safetensors")
    both = torch.stack([torch.cat([stored[f"experts.{i}.w1"], stored[f"experts.{i}.w2"]]) for i in range(3)])
    both = both.view(3, 6, 2, 8).transpose(1, 2).reshape(3, 12, 8)
    qkv = stored["attention.qkv"]
    if not by_rows:
        both, qkv = both.transpose(1, 2), qkv.T
    expected = {"experts.both": both, "attention.q": qkv[:5], "attention.k": qkv[5:]}
    model = LlamaModel(LlamaConfig(vocab_size=2, hidden_size=2, num_hidden_layers=0, num_attention_heads=1))
    for name, value in expected.items():
        module, _, parameter = name.partition(".")
        if not hasattr(model, module):
            model.add_module(module, torch.nn.Module())
        getattr(model, module).register_parameter(parameter, torch.nn.Parameter(torch.zeros(value.shape)))
    weights, found = opened(model, tmp_path)
    weights.read_numel = 0
    for name, value in expected.items():
        numel = value.numel()
        for start, stop in ((0, 7), (7, numel - 4), (numel - 4, numel)):
            assert torch.equal(weights.read(found[name], start, stop), value.reshape(-1)[start:stop]), (name, start)
    assert weights.read_numel == sum(value.numel() for value in stored.values())


def test_operations_that_change_values_are_not_taken_for_moves(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaModel, conversion_mapping, core_model_loading

    class AddOne(core_model_loading.ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **_rest):
            return {target_patterns[0]: next(iter(input_dict.values()))[0] + 1}

    converters = [core_model_loading.WeightConverter("gain", "scale", [AddOne()])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: converters)
    save_file({"gain": torch.arange(12.0).view(3, 4)}, tmp_path / "model.safetensors")
    model = LlamaModel(LlamaConfig(vocab_size=2, hidden_size=2, num_hidden_layers=0, num_attention_heads=1))
    model.register_parameter("scale", torch.nn.Parameter(torch.zeros(3, 4)))
    weights, found = opened(model, tmp_path)
    assert weights.read(found["scale"], 4, 9).tolist() == [5, 6, 7, 8, 9]


def test_files_that_cannot_be_read_say_why(models, tmp_path):
    def error(folder: Path, kind: str = "mixtral") -> str:
        with pytest.raises(ConfigError) as caught:
            model = huggingface.build(kind)
            weights, found = opened(model, folder)
            for stored in found.values():
                weights.refuse_quantized(stored)
        return str(caught.value)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "only pytorch_model.bin" in error(pickled) and "save_pretrained" in error(pickled)

    huggingface.build("mixtral").save_pretrained(shards := tmp_path / "shards", max_shard_size="40KB")
    names = sorted({*json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"].values()})
    assert len(names) > 2
    shutil.move(shards / names[1], tmp_path / "elsewhere")
    assert f"names {names[1]}, which is not in" in error(shards)

    stored = load_file(models / "mixtral" / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({n: v for n, v in stored.items() if n != gone}, (lacking := tmp_path / "lacking.safetensors"))
    assert "tensors are missing for model.layers.1.mlp.experts.gate_up_proj" in error(lacking)
    save_file({n: v for n, v in stored.items() if ".experts.3." not in n}, (fewer := tmp_path / "fewer.safetensors"))
    assert "gate_up_proj has shape [3, 96, 32]" in error(fewer) and "[4, 96, 32] in the model" in error(fewer)

    eight = {n: v.to(torch.float8_e4m3fn) if ".experts." in n else v for n, v in stored.items()}
    save_file(eight, (fp8 := tmp_path / "fp8.safetensors"))
    assert "has dtype F8_E4M3: expected one of F32, BF16" in error(fp8)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "runtime.models.gguf" in error(tmp_path / "model.gguf")


def build_without_drawing(folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def fail(*_: Any, **_also: Any) -> None:
        raise AssertionError("random numbers were drawn into a parameter without memory")

    with mock.patch.object(torch.Tensor, "normal_", fail), deepspeed.zero.Init(weights=folder):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_transformers_initialises_nothing_that_files_have(ranks, models):
    ranks(1).run(build_without_drawing, str(models / next(iter(huggingface.KINDS))))
