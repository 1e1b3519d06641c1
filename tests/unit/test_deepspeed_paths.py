"""DeepSpeed's module paths and names: found, or refused by name."""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn

import runtime as deepspeed
from runtime.deepspeed_paths import ABSENT, ELSEWHERE
from runtime.zero.cut import cut


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runtime.runtime.engine", "DeepSpeedEngine"),
        ("runtime.engine", "DeepSpeedEngine"),
        ("runtime.runtime.zero.partition_parameters", "ZeroParamStatus"),
        ("runtime.zero.offload_config", "OffloadDeviceEnum"),
        ("runtime.runtime.zero.config", "ZeroStageEnum"),
        ("runtime.accelerator", "get_accelerator"),
        ("runtime.checkpoint.utils", "clone_tensors_for_torch_save"),
        ("runtime.comm", "get_rank"),
        ("runtime.utils", "set_z3_leaf_modules"),
        ("runtime.utils.groups", "_get_data_parallel_world_size"),
        ("runtime.ops.adagrad", "DeepSpeedCPUAdagrad"),
        ("runtime.ops.lion", "FusedLion"),
        *((f"runtime.{module}", name) for module, names in ELSEWHERE.items() for name in names),
    ],
)
def test_names_are_found_by_import_and_by_attribute(path: str, name: str) -> None:
    found = getattr(importlib.import_module(path), name)
    by_attribute = deepspeed
    for part in [*path.split(".")[1:], name]:
        by_attribute = getattr(by_attribute, part)
    assert by_attribute is found


def test_runtime_dot_runtime_is_one_package() -> None:
    code = (
        "import runtime, runtime.runtime.zero, sys; from runtime.runtime.config import load; import runtime.config\n"
        "assert runtime.runtime is runtime and runtime.runtime.zero is sys.modules['runtime.zero']\n"
        "assert load is runtime.config.load and runtime.__spec__.name == 'runtime' and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_not_data_parallel_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="zerotop shards data-parallel training"):
        importlib.import_module(f"runtime.{name}.anything")
    *parents, last = name.split(".")
    parent = importlib.import_module(".".join(["runtime", *[part for part in parents if part != "runtime"]]))
    with pytest.raises(AttributeError, match="zerotop shards data-parallel training"):
        getattr(parent, last)


def test_the_version_compares_and_says_whose_it_is() -> None:
    deepspeeds, _, ours = deepspeed.__version__.partition("+")
    assert tuple(int(part) for part in deepspeeds.split(".")) >= (0, 9) and ours.startswith("zerotop.")
    parts = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    assert ".".join(map(str, parts)) == deepspeeds and deepspeed.__git_hash__ is deepspeed.__git_branch__ is None


def test_optimizers_are_classes() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    for kind in (deepspeed.ops.adam.FusedAdam, deepspeed.ops.adam.DeepSpeedCPUAdam):
        assert inspect.isclass(kind) and isinstance(kind(parameters), torch.optim.AdamW)
        with pytest.raises(ValueError, match="amsgrad"):
            kind(parameters, amsgrad=True)


def test_lamb_can_be_imported_by_scripts_that_use_another_optimizer() -> None:
    from runtime.ops.lamb import FusedLamb

    with pytest.raises(NotImplementedError, match="Use AdamW"):
        FusedLamb([nn.Parameter(torch.ones(2))], lr=0.1)


def test_a_scripts_own_local_rank_gets_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for own in (True, False):
        parser = argparse.ArgumentParser()
        if own:
            parser.add_argument("--local_rank", type=int, default=-1)
        arguments = deepspeed.add_config_arguments(parser).parse_args(["--deepspeed"])
        assert arguments.local_rank == 3 and arguments.deepspeed and arguments.deepspeed_config is None


def test_the_zero_section_as_deepspeeds_class() -> None:
    from runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum

    section = DeepSpeedZeroConfig(
        stage=3, stage3_max_reuse_distance=5, cpu_offload=True, cpu_offload_use_pin_memory=False
    )
    assert section.stage == ZeroStageEnum.weights and section.overlap_comm and section.max_reuse_distance == 5
    assert section.offload_optimizer is not None and section.offload_param is None
    assert section.offload_optimizer.device == "cpu" and not section.offload_optimizer.pin_memory
    assert DeepSpeedZeroConfig(stage3_gather_fp16_weights_on_model_save=True).gather_16bit_weights_on_model_save
    plain = DeepSpeedZeroConfig(reduce_bucket_size="auto", offload_optimizer={"pipeline_read": True, "ratio": "auto"})
    assert plain.reduce_bucket_size == 500_000_000 and not plain.overlap_comm
    assert (
        plain.offload_optimizer is not None and plain.offload_optimizer.pipeline and plain.offload_optimizer.ratio == 1
    )
    with pytest.raises(ValueError, match="bucket_sise"):
        DeepSpeedZeroConfig(bucket_sise=1)
    config = deepspeed.DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": {"stage": 2, "overlap_comm": True}})
    assert config.zero_config.stage == ZeroStageEnum.gradients and config.zero_config.overlap_comm
    assert deepspeed.DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": True}).zero_config.stage == 1


def test_names_of_optimizers_as_constants() -> None:
    from runtime.runtime.config import ADAM_OPTIMIZER, ADAMW_OPTIMIZER, ONEBIT_ADAM_OPTIMIZER

    assert (ADAM_OPTIMIZER, ADAMW_OPTIMIZER, ONEBIT_ADAM_OPTIMIZER) == ("adam", "adamw", "onebitadam")
    with pytest.raises(AttributeError, match="NO_OPTIMIZER"):
        deepspeed.config.NO_OPTIMIZER  # noqa: B018


def test_models_without_experts_keep_their_groups() -> None:
    from runtime.moe.utils import has_moe_layers, is_moe_param, split_params_into_different_moe_groups_for_optimizer

    model = nn.Linear(2, 2)
    group = {"params": list(model.parameters()), "lr": 0.1}
    assert split_params_into_different_moe_groups_for_optimizer(group) == [group]
    assert split_params_into_different_moe_groups_for_optimizer((group, {"params": []})) == [group, {"params": []}]
    assert has_moe_layers(model) == (False, 0) and not is_moe_param(model.weight)


def test_deepspeeds_module_of_the_logger_does_not_hide_pythons() -> None:
    code = (
        "from runtime.utils import logging as theirs, set_log_level_from_string, log_dist; import logging\n"
        "import runtime.utils.logging as again; from runtime.utils import logger\n"
        "assert theirs is again and theirs.logger is logger and theirs is not logging\n"
        "set_log_level_from_string('ERROR'); log_dist('x', ranks=[-1]); assert logger.level == logging.ERROR\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_small_tools() -> None:
    from runtime.checkpoint.utils import clone_tensors_for_torch_save
    from runtime.utils import OnDevice, RepeatingLoader, move_to_device

    loader = RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(StopIteration):
        next(RepeatingLoader([]))
    with OnDevice(torch.bfloat16):
        layer = nn.Linear(2, 2)
    assert layer.weight.is_meta and layer.weight.dtype is torch.bfloat16 and torch.get_default_dtype() is torch.float32
    whole = torch.arange(1000.0)
    saved = clone_tensors_for_torch_save({"a": [whole[:2]], "b": (1, "x")})
    assert saved["a"][0].untyped_storage().nbytes() == 8 and saved["b"] == (1, "x")
    moved = move_to_device({"x": [whole], "y": 1}, "meta", lambda tensor: tensor.numel() > 1)
    assert moved["x"][0].is_meta and moved["y"] == 1


def test_a_script_may_clip_gradients_that_no_engine_has() -> None:
    from runtime.runtime.utils import clip_grad_norm_, set_random_seed

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        made[0].grad, made[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        return made

    ours, theirs = parameters(), parameters()
    assert clip_grad_norm_(ours, 0.5) == torch.nn.utils.clip_grad_norm_(theirs, 0.5) == 5
    assert [p.grad if p.grad is None else p.grad.tolist() for p in ours] == [
        p.grad if p.grad is None else p.grad.tolist() for p in theirs
    ]
    assert clip_grad_norm_(parameters()[0], 0.5, float("inf")) == 3
    drawn = []
    for _ in range(2):
        set_random_seed(2**40)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_leaf_modules_are_remembered() -> None:
    from runtime.utils import get_z3_leaf_modules, set_z3_leaf_modules, unset_z3_leaf_modules, z3_leaf_module

    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert set_z3_leaf_modules(model, [nn.Linear]) == [model[0]] == get_z3_leaf_modules(model)
    assert z3_leaf_module(model[0]) and not z3_leaf_module(model[1])
    assert unset_z3_leaf_modules(model, ["Linear"]) == [model[0]] and get_z3_leaf_modules(model) == []
    layers = nn.ModuleDict({"a": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), "b": nn.Linear(2, 2)})
    assert [unit.name for unit in cut(layers)] == ["a.0", "a.1", "head"]
    set_z3_leaf_modules(layers, [nn.ModuleList])
    assert [unit.name for unit in cut(layers)] == ["root"]
    with pytest.raises(ValueError, match="leaf modules"):
        set_z3_leaf_modules(model, [nn.Conv2d])


def test_the_accelerator_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROTOP_DEVICE", "cpu")
    accelerator = deepspeed.get_accelerator()
    assert accelerator.device_name(1) == accelerator.current_device_name() == "cpu"
    assert accelerator.communication_backend_name() == "gloo" and not accelerator.is_fp16_supported()
    assert accelerator.on_accelerator(torch.ones(1)) and accelerator.memory_allocated() > 0
    assert accelerator.Stream is torch.cpu.Stream
    with pytest.raises(AttributeError, match="neither the accelerator nor"):
        accelerator.no_such_thing  # noqa: B018
