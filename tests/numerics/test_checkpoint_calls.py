"""What scripts ask of checkpoints beside the states themselves: names, tags, frozen parameters, buffers of each rank,
compiled models, and parameter groups that a scheduler moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler as schedulers

from runtime.checkpoint import CheckpointError, read_manifest
from tests.numerics.training import message_of


def settings(stage: int, lr: float = 0.1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "eps": 1e-5}},
        **more,
    }


def engine_of(model: nn.Module, config: dict[str, Any], **given: Any) -> Any:
    from runtime.engine.initialize import initialize

    return initialize(model=model, config=config, **given)[0]


def blocks(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])


def train(engine: Any, steps: int) -> list[list[float]]:
    """The learning rates of each step."""
    rates = []
    for _ in range(steps):
        rates.append(engine.get_lr())
        inputs = torch.randn(2, 6, generator=torch.Generator().manual_seed(engine.global_steps * 7 + dist.get_rank()))
        engine.backward(engine(inputs).square().mean())
        engine.step()
    return rates


def values(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module_state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- names and tags


def names_and_tags(folder: str) -> dict[str, Any]:
    rank, place, found = dist.get_rank(), Path(folder), {}
    engine = engine_of(blocks(), settings(2))
    found["nothing"] = engine.load_checkpoint(str(place / "nothing"))
    train(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 1)
    engine.save_checkpoint(folder, tag=7, save_latest=False)
    engine.save_checkpoint(folder, tag="beside", save_latest=False, wait=False)
    engine.wait_for_checkpoint()
    fresh = engine_of(blocks(), settings(2))
    found["taken"] = fresh.load_checkpoint(folder)[0], fresh.global_steps
    fresh.load_checkpoint(folder, "7")
    found["by tag"] = fresh.global_steps
    found["refused"] = [
        message_of(CheckpointError, lambda bad=bad: fresh.save_checkpoint(*bad))
        for bad in (("",), (folder, "a/b"), (folder, ".hidden"))
    ]
    found["value"] = [message_of(ValueError, lambda bad=bad: fresh.save_checkpoint(bad)) for bad in ("", None)]
    fresh.save_checkpoint(f"{folder}/warned", tag=f"of-{rank}")
    found["warned"] = fresh.load_checkpoint(f"{folder}/warned")[0]
    strict = engine_of(blocks(), settings(2, checkpoint={"tag_validation": "FAIL"}))
    found["failed"] = message_of(CheckpointError, lambda: strict.save_checkpoint(f"{folder}/strict", tag=f"of-{rank}"))
    fresh.save_checkpoint(f"{folder}/of-{rank}")
    found["folder"] = fresh.load_checkpoint(f"{folder}/of-0")[0]
    found["folders"] = message_of(CheckpointError, lambda: strict.save_checkpoint(f"{folder}/strict-{rank}"))
    return found


def test_names_tags_and_latest(ranks, tmp_path):
    for found in ranks(2).run(names_and_tags, str(tmp_path)):
        assert found["nothing"] == (None, {})
        assert found["taken"] == (str(tmp_path / "global_step1"), 1), "save_latest=False is not what a load begins from"
        assert found["by tag"] == 2
        empty, slash, hidden = found["refused"]
        assert "expected a folder" in empty and "without slashes or a leading dot" in slash and "'.hidden'" in hidden
        assert all("expected a folder" in text for text in found["value"])
        assert found["warned"] == str(tmp_path / "warned" / "of-0")
        assert "'of-0' on rank 0 and 'of-1' on rank 1" in found["failed"]
        assert found["folder"] == str(tmp_path / "of-0" / "global_step2")
        assert "different folders" in found["folders"] and "strict-1' on rank 1" in found["folders"]
    assert (tmp_path / "latest").read_text() == "global_step1\n"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("of-")) == [
        "7", "beside", "global_step1", "latest", "warned",
    ]  # fmt: skip
    assert not (tmp_path / "of-1").exists()


# ---- buffers


class Counting(nn.Module):
    """Buffers: one that the ranks hold alike, one that differs between them, one that differs on the last rank only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("table", torch.arange(600.0))
        self.register_buffer("odd", torch.tensor(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.odd.fill_(dist.get_rank() // 2)
        return self.norm(self.linear(inputs))


def with_buffers(folder: str, wait: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    engine = engine_of(Counting(dist.get_rank()), settings(2))
    train(engine, 3)
    engine.save_checkpoint(folder, wait=wait)
    engine.wait_for_checkpoint()
    return values(engine)


def buffers_again(folder: str) -> dict[str, torch.Tensor]:
    engine = engine_of(Counting(0), settings(1))
    engine.load_checkpoint(folder)
    return values(engine)


@pytest.mark.parametrize("wait", [True, False])
def test_every_rank_gets_its_own_buffers_back(ranks, tmp_path, wait):
    saved = ranks(3).run(with_buffers, str(tmp_path), wait)
    means = [found["norm.running_mean"] for found in saved]
    assert not torch.equal(means[0], means[1]) and not torch.equal(means[1], means[2])
    assert all(equal(*pair) for pair in zip(saved, ranks(3).run(buffers_again, str(tmp_path)), strict=True))
    for found in ranks(2).run(buffers_again, str(tmp_path)):
        assert equal(found, saved[0]), "at another world size they are rank 0's"
    (path,) = tmp_path.glob("global_step*")
    assert read_manifest(path).buffer_owners == {
        "norm.running_mean": [0, 1, 2], "norm.running_var": [0, 1, 2], "odd": [0, 0, 2],
    }  # fmt: skip
    assert sum(b"rank-" in line for line in (path / "tensors.json").read_bytes().split(b'":{')) == 5


def rounded(folder: str) -> list[str]:
    """A model that keeps in fp32 what the checkpoint has in bf16."""
    import logging

    told: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    def made(dtype: torch.dtype) -> Any:
        model = blocks()
        model.register_buffer("positions", torch.arange(4, dtype=dtype) / 3)
        return engine_of(model, settings(1))

    made(torch.bfloat16).save_checkpoint(folder)
    logger, handler = logging.getLogger("runtime.checkpoint"), Heard()
    logger.addHandler(handler)
    try:
        made(torch.float32).load_checkpoint(folder)
        first = list(told)
        made(torch.bfloat16).load_checkpoint(folder)
        assert told == first
    finally:
        logger.removeHandler(handler)
    return first


def test_a_buffer_that_was_rounded_is_named(ranks, tmp_path):
    (told,), silent = ranks(2).run(rounded, str(tmp_path))
    assert "positions (bfloat16, here float32)" in told and silent == []


# ---- frozen parameters


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6) * 0.1), nn.Parameter(torch.zeros(6, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


def adapted(seed: int, trained: bool = False) -> nn.Module:
    model = nn.Sequential(*[Adapted(base) for base in blocks(seed)])
    model[0].base.requires_grad_(trained)
    return model


def adapters_alone(folder: str, stage: int) -> dict[str, Any]:
    engine = engine_of(adapted(0), settings(stage))
    train(engine, 2)
    engine.save_checkpoint(f"{folder}/whole")
    engine.save_checkpoint(f"{folder}/adapters", exclude_frozen_parameters=True)
    engine.save_checkpoint(f"{folder}/beside", exclude_frozen_parameters=True, wait=False)
    engine.wait_for_checkpoint()
    engine.save_16bit_model(folder, "adapters.bin", exclude_frozen_parameters=True)
    expected = values(engine)
    other = engine_of(adapted(5), settings(stage))
    base = values(other)
    other.load_checkpoint(f"{folder}/adapters")
    mixed = {name: base[name] if ".base." in name else value for name, value in expected.items()}
    same = engine_of(adapted(0), settings(stage))
    same.load_checkpoint(f"{folder}/beside")
    train(engine, 2)
    train(same, 2)
    unfrozen = engine_of(adapted(0, trained=True), settings(stage))
    return {
        "others stay": equal(values(other), mixed),
        "goes on": equal(values(same), values(engine)),
        "refused": message_of(CheckpointError, lambda: unfrozen.load_checkpoint(f"{folder}/adapters")),
    }


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_are_saved_without_their_base_model(ranks, tmp_path, stage):
    for found in ranks(2).run(adapters_alone, str(tmp_path), stage):
        assert found["others stay"] and found["goes on"]
        assert "without its frozen parameters" in found["refused"] and "0.base." in found["refused"]
    names = set(torch.load(tmp_path / "adapters.bin", weights_only=True))
    assert names == {f"{index}.{name}" for index in range(3) for name in ("up", "down")}
    text = (tmp_path / "adapters" / "global_step2" / "tensors.json").read_text()
    assert "base" not in text and "param.0.up" in text
    assert "base" in (tmp_path / "whole" / "global_step2" / "tensors.json").read_text()


# ---- compiled models

WAYS = {
    "plain": lambda model: model,
    "whole": lambda model: torch.compile(model, backend="eager"),
    "blocks": lambda model: nn.Sequential(*[torch.compile(block, backend="eager") for block in model]),
}


def compiled(folder: str, stage: int) -> dict[str, Any]:
    saved, found = {}, {}
    for way, make in WAYS.items():
        engine = engine_of(make(blocks()), settings(stage))
        train(engine, 2)
        engine.save_checkpoint(f"{folder}/{way}")
        saved[way] = values(engine)
        found[f"names of {way}"] = [name for name, _ in engine.named_parameters()]
    for way, make in WAYS.items():
        for other in WAYS:
            engine = engine_of(make(blocks(1)), settings(stage))
            engine.load_checkpoint(f"{folder}/{other}")
            found[f"{way} reads {other}"] = equal(values(engine), saved[other])
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_and_plain_models_read_each_others(ranks, tmp_path, stage):
    for found in ranks(2).run(compiled, str(tmp_path), stage):
        assert len({str(found.pop(f"names of {way}")) for way in WAYS}) == 1
        assert all(found.values()), found
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"_orig_mod" not in file.read_bytes(), file


# ---- parameter groups


def one_cycle(optimizer: Any, top: float = 0.1) -> Any:
    return schedulers.OneCycleLR(optimizer, [top, top / 2], total_steps=20)


FOLLOWS: dict[str, Any] = {
    "none": None,
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 20),
    "ExponentialLR": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9),
    "MultiplicativeLR": lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda step: 0.9),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, 0.5, total_iters=3), schedulers.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
    "WarmupLR": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_type": "linear"}},
    "WarmupCosineLR": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 20}},
    "OneCycle": {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 8}},
    "OneCycleLR": one_cycle,
}


def grouped(name: str, lr: float) -> Any:
    """Two parameter groups; the second has its own learning rate, weight decay and a key of the script's."""
    model, schedule = blocks(), FOLLOWS[name]
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": lr / 2, "weight_decay": 0.3, "kind": "b"}]
    if isinstance(schedule, dict):
        return engine_of(model, settings(1, lr, scheduler=schedule), model_parameters=groups)
    return engine_of(model, settings(1, lr), model_parameters=groups, lr_scheduler=schedule)


def numbers(engine: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]


def resumed(folder: str, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        engine = grouped(name, 0.1)
        train(engine, 5)
        engine.optimizer.param_groups[1]["weight_decay"] = 0.2
        engine.save_checkpoint(f"{folder}/{name}")
        again = grouped(name, 0.1)
        again.load_checkpoint(f"{folder}/{name}")
        at_once = numbers(again) == numbers(engine)
        rates, on, ends = train(engine, 4), train(again, 4), (values(engine), values(again))
        found[name] = at_once and rates == on and equal(*ends) and numbers(again) == numbers(engine)
        smaller = grouped(name, 0.01)
        straight = grouped(name, 0.01)
        train(straight, 5)
        smaller.load_checkpoint(f"{folder}/{name}")
        found[f"{name}, changed"] = train(smaller, 4), train(straight, 4)
    return found


def test_parameter_groups_and_schedules_go_on_and_follow_a_changed_rate(ranks, tmp_path):
    """Every value of every group, bit for bit; and with another learning rate in the config, that one's schedule from
    the first step on, as if it had been so from the start."""
    for found in ranks(2).run(resumed, str(tmp_path), list(FOLLOWS)):
        for name in FOLLOWS:
            assert found[name] is True, name
            ours, straight = (torch.tensor(rates) for rates in found[f"{name}, changed"])
            torch.testing.assert_close(ours, straight, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def other_maximum(folder: str) -> Any:
    """A scheduler whose own rates were changed: OneCycleLR has them in the groups, too."""
    engine = grouped("OneCycleLR", 0.1)
    train(engine, 5)
    engine.save_checkpoint(folder)
    FOLLOWS["lower"] = lambda optimizer: one_cycle(optimizer, 0.02)
    lower, straight = grouped("lower", 0.1), grouped("lower", 0.1)
    lower.load_checkpoint(folder)
    train(straight, 5)
    return train(lower, 4), train(straight, 4)


def test_a_one_cycle_of_another_height_goes_on_at_its_step(ranks, tmp_path):
    for ours, straight in ranks(2).run(other_maximum, str(tmp_path)):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(straight), rtol=1e-6, atol=0)


# ---- custom_load_fn


def by_own_function(folder: str, stage: int) -> dict[str, bool]:
    """The script's function renames: what was block 0 is block 1 now."""
    engine = engine_of(blocks(), settings(stage))
    train(engine, 2)
    engine.save_checkpoint(folder)

    def load(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in dst.named_parameters():
                index, rest = name.split(".")
                parameter.copy_(src[f"{(int(index) + 1) % 3}.{rest}"])

    again = engine_of(blocks(1), settings(stage))
    again.load_checkpoint(folder, custom_load_fn=load)
    before, after = values(engine), values(again)
    turned = {name: before[f"{(int(name[0]) + 1) % 3}{name[1:]}"] for name in before}
    steps = again.global_steps
    train(again, 1)
    return {
        "turned": equal(after, turned),
        "masters, too": not equal(values(again), after) and equal(after, turned),
        "the rest": steps == 2 and again.optimizer_steps == 3,
    }


@pytest.mark.parametrize("stage", [1, 3])
def test_a_function_of_the_scripts_can_load_the_module(ranks, tmp_path, stage):
    for found in ranks(2).run(by_own_function, str(tmp_path), stage):
        assert all(found.values()), found


# ---- optimizer.state_dict()


def by_state_dict(stage: int, kind: str) -> tuple[bool, float, list[str], set[frozenset[str]]]:
    """A script that keeps the states itself: the module's and its optimizer's."""
    config = settings(stage, optimizer={"type": kind, "params": {"lr": 0.1}})
    engine = engine_of(blocks(), config)
    train(engine, 3)
    saved = engine.optimizer.state_dict()
    again = engine_of(blocks(1), config)
    again.global_steps = engine.global_steps
    again.optimizer.load_state_dict(saved)
    train(engine, 2)
    train(again, 2)
    other = {**saved, "rank": saved["rank"] + 1}
    strange = {**saved, "state": {**saved["state"], "0.weight": {"param": torch.zeros(1)}}}
    refused = [
        message_of(ValueError, lambda bad=bad: again.optimizer.load_state_dict(bad)) for bad in ({}, other, strange)
    ]
    kinds = {frozenset(tensors) for tensors in saved["state"].values()}
    return equal(values(engine), values(again)), saved["param_groups"][0]["lr"], refused, kinds


@pytest.mark.parametrize(("stage", "kind"), [(0, "AdamW"), (2, "RMSprop"), (3, "AdamW")])
def test_the_optimizers_state_dict_is_this_ranks_and_brings_everything_back(ranks, stage, kind):
    tensors = {"RMSprop": {"param", "square_avg"}, "AdamW": {"param", "exp_avg", "exp_avg_sq"}}[kind]
    kinds: set[frozenset[str]] = set()
    for goes_on, lr, (nothing, other, strange), of_rank in ranks(2).run(by_state_dict, stage, kind):
        kinds |= of_rank  # of so small a model one rank may have nothing
        assert goes_on and lr == 0.1
        assert "'rank' is missing" in nothing and "the states are from rank" in other and "another model" in strange
    assert kinds == {frozenset(tensors)}, "as torch's: a dict of tensors for each parameter"
