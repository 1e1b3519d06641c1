"""The warm-up schedules against DeepSpeed's figures, worked out by hand from its formulas."""

from __future__ import annotations

import math

import pytest

from runtime.config import load
from runtime.optim.lr import learning_rate


def schedule(kind: str, **params):
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    config = load({**base, "scheduler": {"type": kind, "params": params}, "zerotop": {"train": {"steps": 100}}})
    return config.resolve(1, "cpu").scheduler


def test_warmup_lr_grows_linearly_then_stays():
    config = schedule("WarmupLR", warmup_min_lr=0.0, warmup_max_lr=0.1, warmup_num_steps=10, warmup_type="linear")
    assert [learning_rate(config, i, 0.1) for i in (-1, 0, 5, 10, 99)] == pytest.approx([0, 0, 0.05, 0.1, 0.1])


def test_warmup_lr_grows_with_the_logarithm_by_default():
    config = schedule("WarmupLR", warmup_max_lr=0.1, warmup_num_steps=10)
    assert learning_rate(config, 4, 0.1) == pytest.approx(0.1 * math.log(5) / math.log(10))


def test_warmup_decay_reaches_zero_at_the_last_step():
    config = schedule(
        "WarmupDecayLR", warmup_max_lr=0.1, warmup_num_steps=10, warmup_type="linear", total_num_steps=110
    )
    assert [learning_rate(config, i, 0.1) for i in (5, 10, 60, 110, 200)] == pytest.approx([0.05, 0.1, 0.05, 0, 0])


def test_warmup_cosine_is_a_ratio_of_the_groups_own_rate():
    config = schedule(
        "WarmupCosineLR", warmup_num_steps=10, warmup_type="linear", total_num_steps=110, cos_min_ratio=0.1
    )
    assert learning_rate(config, -1, 0.3) == 0
    assert learning_rate(config, 5, 0.3) == pytest.approx(0.15)
    assert learning_rate(config, 59, 0.3) == pytest.approx(0.3 * 0.55)  # half-way down: 0.1 + 0.9 / 2
    assert learning_rate(config, 109, 0.3) == pytest.approx(0.03)
