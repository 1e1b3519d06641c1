"""The schedules against DeepSpeed's figures, worked out by hand from its formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from runtime import lr_schedules
from runtime.config import ConfigError, load
from runtime.lr_schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from runtime.optim.lr import Schedule, schedule_from_config


def optimizer(*rates: float, kind: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_at(schedule: Schedule, *iterations: int) -> list[Any]:
    """Of the first group, or of all where there are several."""
    found = []
    for iteration in iterations:
        schedule.step(iteration)
        rates = schedule.get_last_lr()
        found.append(rates[0] if len(rates) == 1 else rates)
    return found


def test_warmup_lr_grows_linearly_then_stays():
    schedule = WarmupLR(optimizer(0.3), warmup_max_lr=0.1, warmup_num_steps=10, warmup_type="linear")
    assert schedule.get_last_lr() == [0.0]
    assert rates_at(schedule, 0, 5, 10, 99) == pytest.approx([0, 0.05, 0.1, 0.1])


def test_warmup_lr_grows_with_the_logarithm_by_default():
    schedule = WarmupLR(optimizer(0.1), warmup_max_lr=0.1, warmup_num_steps=10)
    assert rates_at(schedule, 4) == pytest.approx([0.1 * math.log(5) / math.log(10)])


@pytest.mark.parametrize("kind", [WarmupLR, WarmupDecayLR, WarmupCosineLR])
def test_each_group_warms_up_to_its_own_rate(kind):
    more = {} if kind is WarmupLR else {"total_num_steps": 100}
    if kind is WarmupDecayLR:
        more["warmup_max_lr"] = None
    schedule = kind(optimizer(0.3, 0.2), warmup_num_steps=2, warmup_type="linear", **more)
    assert rates_at(schedule, 1)[0] == pytest.approx([0.15, 0.1])
    listed = WarmupLR(optimizer(0.3, 0.2), warmup_min_lr=[0.1, 0.0], warmup_max_lr=[1.0, 2.0], warmup_num_steps=2)
    assert rates_at(listed, -1, 2) == [[0.1, 0.0], [1.0, 2.0]]


def test_warmup_decay_reaches_zero_at_the_last_step():
    schedule = WarmupDecayLR(optimizer(0.3), 110, warmup_max_lr=0.1, warmup_num_steps=10, warmup_type="linear")
    assert rates_at(schedule, 5, 10, 60, 110, 200) == pytest.approx([0.05, 0.1, 0.05, 0, 0])


def test_warmup_cosine_is_a_ratio_of_the_groups_own_rate():
    schedule = WarmupCosineLR(optimizer(0.3), 110, warmup_num_steps=10, warmup_type="linear", cos_min_ratio=0.1)
    # Half-way down: 0.1 + 0.9 / 2.
    assert rates_at(schedule, -1, 5, 59, 109, 999) == pytest.approx([0, 0.15, 0.3 * 0.55, 0.03, 0.03])


def test_the_range_test_grows_without_end():
    schedule = LRRangeTest(optimizer(0.3), 1e-4, lr_range_test_step_size=10, lr_range_test_step_rate=5.0)
    assert schedule.get_last_lr() == pytest.approx([1e-4])
    assert rates_at(schedule, 4, 9, 99) == pytest.approx([1e-4 * 3.5, 1e-4 * 6, 1e-4 * 51])
    stairs = LRRangeTest(optimizer(0.3), 1e-4, 10, 5.0, lr_range_test_staircase=True)
    assert rates_at(stairs, 8, 9, 18, 19) == pytest.approx([1e-4, 6e-4, 6e-4, 11e-4])


def test_one_cycle_goes_up_and_down_and_decays_and_momentum_the_other_way():
    adam = optimizer(0.3)
    schedule = OneCycle(
        adam, 0.1, 0.5, decay_lr_rate=1.0, cycle_first_step_size=4, cycle_second_step_size=2, decay_step_size=3,
        cycle_min_mom=0.8, cycle_max_mom=0.9, decay_mom_rate=0.5,
    )  # fmt: skip
    rates, moms = [schedule.get_last_lr()[0]], [adam.param_groups[0]["betas"][0]]
    for _ in range(9):
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
        moms.append(adam.param_groups[0]["betas"][0])
    # Up in four steps, down in two; at the end of the cycle DeepSpeed begins another one for a single step.
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1 / (4 / 3), 0.1 / (5 / 3), 0.1 / 2])
    assert moms == pytest.approx([0.8, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 1.05, 1.2, 1.35])
    assert adam.param_groups[0]["betas"][1] == 0.99
    sgd = optimizer(0.3, kind=torch.optim.SGD)
    OneCycle(sgd, 0.1, 0.5).step()
    assert "betas" not in sgd.param_groups[0]


def test_one_cycle_in_stairs():
    schedule = OneCycle(optimizer(0.3), 0.0, 1.0, cycle_first_step_size=6, cycle_first_stair_count=2)
    assert rates_at(schedule, *range(11)) == pytest.approx([0, 0, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0, 0])


@pytest.mark.parametrize("name", lr_schedules.VALID_LR_SCHEDULES)
def test_a_schedule_goes_on_where_it_was(name):
    numbers = {
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3},
        "WarmupDecayLR": {"total_num_steps": 20},
        "WarmupCosineLR": {"total_num_steps": 20},
    }.get(name, {})
    if name.startswith("Warmup"):
        numbers["warmup_num_steps"] = 5
    first, second = (getattr(lr_schedules, name)(optimizer(0.3, 0.2), **numbers) for _ in range(2))
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(9):
        assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
        assert second.optimizer.param_groups[0]["betas"] == first.optimizer.param_groups[0]["betas"]
        first.step()
        second.step()


def test_a_config_makes_them():
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}

    def made(kind: str, groups: int = 2, **params: Any) -> Schedule:
        config = load({**base, "scheduler": {"type": kind, "params": params}, "zerotop": {"train": {"steps": 100}}})
        resolved = type(found := config.resolve(1, "cpu")).from_json(found.model_dump_json().encode())
        return schedule_from_config(optimizer(*[0.3, 0.2][:groups]), resolved.scheduler)

    assert rates_at(made("WarmupLR", warmup_num_steps=2), 2) == [[0.3, 0.2]]
    assert rates_at(made("WarmupDecayLR", warmup_num_steps=2), 2) == [[0.001, 0.001]]
    assert rates_at(made("WarmupDecayLR", warmup_num_steps=2, warmup_max_lr="auto"), 2) == [[0.3, 0.2]]
    assert rates_at(made("OneCycle", cycle_min_lr=[0.1, 0.2], cycle_max_lr=1), -1) == [[0.1, 0.2]]
    assert rates_at(made("LRRangeTest", lr_range_test_step_size=1), 1) == [[0.003, 0.003]]
    with pytest.raises(ValueError, match="cycle_max_lr: expected one number, or one for each of 2"):
        made("OneCycle", cycle_min_lr=0.1, cycle_max_lr=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match=r"scheduler\.params\.cycle_min_lr"):
        made("OneCycle", cycle_min_lr=[], cycle_max_lr=1)


def test_deepspeeds_names_of_types_and_parameters():
    config = {"type": lr_schedules.WARMUP_LR, "params": {lr_schedules.WARMUP_MAX_LR: 0.1}}
    assert config == {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
    assert lr_schedules.LR_RANGE_TEST_STAIRCASE == "lr_range_test_staircase" and lr_schedules.ONE_CYCLE == "OneCycle"
    with pytest.raises(AttributeError):
        _ = lr_schedules.WARMUP_PARTY
