"""Models with peft's LoRA adapters, played by small modules that have its names: exports that peft reads, or a refusal
with the way out; base weights from files."""

from __future__ import annotations

import copy
import enum
import json
import math
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.numerics.test_checkpoint_calls import engine_of, settings, train
from zerotop.cli import main


class LoraLayer(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        device = base_layer.weight.device  # as peft does: with zero.Init they end up where the base layer is
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False).to(device)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False).to(device)})
        if device.type != "meta":
            self.reset_lora_parameters("default", True)

    def reset_lora_parameters(self, adapter: str, _kind: bool) -> None:
        nn.init.kaiming_uniform_(self.lora_A[adapter].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter].weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))


class Kept(nn.Module):
    """modules_to_save: a copy is trained beside the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.original_module = original.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.modules_to_save["default"](inputs)


class Inner(nn.Module):
    """The base model."""

    config = SimpleNamespace(to_dict=lambda: {"model_type": "inner", "architectures": ["Inner"]})

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(inputs))


class Kind(enum.StrEnum):
    LORA = "LORA"


class Wrapped(nn.Module):
    """As PeftModel: the names, and both configs."""

    def __init__(self, described: bool = True) -> None:
        super().__init__()
        inner = Inner()
        inner.first, inner.head = LoraLayer(inner.first), Kept(inner.head)
        self.base_model = nn.Module()
        self.base_model.model = inner
        self.config = inner.config
        if described:
            config = {"peft_type": Kind.LORA, "r": 2, "target_modules": {"first"}, "bias": "none"}
            self.peft_config = {"default": SimpleNamespace(to_dict=lambda: config)}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_model.model(inputs)


def save_adapters(folder: str) -> dict[str, torch.Tensor]:
    engine = engine_of(Wrapped(), settings(3))
    train(engine, 2)
    engine.save_checkpoint(f"{folder}/whole")
    engine.save_checkpoint(f"{folder}/alone", exclude_frozen_parameters=True)
    undescribed = engine_of(Wrapped(described=False), settings(1))
    undescribed.save_checkpoint(f"{folder}/undescribed")
    plain = engine_of(nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)), settings(1))
    plain.save_checkpoint(f"{folder}/plain", exclude_frozen_parameters=True)
    both = Wrapped()
    both.requires_grad_(True)
    engine_of(both, settings(1)).save_checkpoint(f"{folder}/both")
    return engine.state_dict()


def test_an_export_is_what_peft_reads_or_is_refused(ranks, tmp_path, capfd, export_here):
    state = ranks(2).run(save_adapters, str(tmp_path))[0]
    inner = "base_model.model."
    expected = {
        f"{inner}first.lora_A.weight": state[f"{inner}first.lora_A.default.weight"],
        f"{inner}first.lora_B.weight": state[f"{inner}first.lora_B.default.weight"],
        f"{inner}head.weight": state[f"{inner}head.modules_to_save.default.weight"],
        f"{inner}head.bias": state[f"{inner}head.modules_to_save.default.bias"],
    }
    for kind in ("whole", "alone"):
        out = tmp_path / f"{kind}-out"
        assert main(["export", str(tmp_path / kind), str(out)]) == 0
        assert "These are the adapters alone" in capfd.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        written = load_file(out / "adapter_model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)
        assert json.loads((out / "adapter_config.json").read_text()) == {
            "bias": "none", "inference_mode": True, "peft_type": "LORA", "r": 2, "target_modules": ["first"],
        }  # fmt: skip
    for kind, words in {
        "undescribed": "has no adapter_config.json",
        "both": "was trained, too",
        "plain": "without its frozen parameters",
    }.items():
        assert main(["export", str(tmp_path / kind), str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert words in error and (kind == "plain" or "merge_and_unload()" in error)
        assert not (tmp_path / "out").exists()


def from_files(path: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    from runtime import zero

    with zero.Init(weights=path):
        inner = Inner()
    model = Wrapped.__new__(Wrapped)
    nn.Module.__init__(model)
    inner.first, inner.head = LoraLayer(inner.first), Kept(inner.head)
    model.base_model = nn.Module()
    model.base_model.model = inner
    moved = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    return engine_of(model, settings(3)).state_dict(), moved


def test_base_weights_are_found_under_the_names_of_peft_and_adapters_begin_as_its_own(ranks, tmp_path):
    torch.manual_seed(3)
    base = Inner().state_dict()
    save_file(base, tmp_path / "model.safetensors")
    for state, moved in ranks(2).run(from_files, str(tmp_path)):
        inner = "base_model.model."
        assert f"{inner}first.lora_B.default.weight" in moved, "else there is nothing to draw"
        for name in ("weight", "bias"):
            assert torch.equal(state[f"{inner}first.base_layer.{name}"], base[f"first.{name}"])
            assert torch.equal(state[f"{inner}head.original_module.{name}"], base[f"head.{name}"])
            assert torch.equal(state[f"{inner}head.modules_to_save.default.{name}"], base[f"head.{name}"])
        assert state[f"{inner}first.lora_B.default.weight"].abs().max() == 0
        assert 0 < state[f"{inner}first.lora_A.default.weight"].abs().max() <= 6**-0.5
