"""DeepSpeed's warm-up schedules, step for step (deepspeed/runtime/lr_schedules.py, v0.19: WarmupLR, WarmupDecayLR,
WarmupCosineLR).

Like DeepSpeed's they count iterations from -1, so the first optimizer step runs at the schedule's minimum, and a
schedule is advanced after each optimizer step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.config import SchedulerConfig, WarmupCosineLR


class WarmupSchedule:
    """Sets the learning rate of every parameter group; `step()` after each optimizer step."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: SchedulerConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.iteration = config.last_batch_iteration
        self._set()

    def step(self) -> None:
        self.iteration += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]  # the rates themselves are the config's, which may have changed
        self._set()

    def _set(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = learning_rate(self.config, self.iteration, base)


def learning_rate(config: SchedulerConfig, iteration: int, base: float) -> float:
    """The learning rate at `iteration` (-1 before the first optimizer step) for a group whose own is `base`."""
    warmup = max(2, config.warmup_num_steps)
    if isinstance(config, WarmupCosineLR):
        return base * _cosine_ratio(config, iteration, warmup)
    low = config.warmup_min_lr
    high = config.warmup_max_lr if config.warmup_max_lr is not None else base
    if iteration < 0:
        return low
    gamma = _warm(iteration, warmup, config.warmup_type)
    if config.type == "WarmupDecayLR" and iteration >= warmup:
        gamma = max(0.0, (config.total_num_steps - iteration) / max(1.0, config.total_num_steps - warmup))
    return low + (high - low) * gamma


def _warm(iteration: int, warmup: int, shape: str) -> float:
    if iteration >= warmup:
        return 1.0
    return iteration / warmup if shape == "linear" else math.log(iteration + 1) / math.log(warmup)


def _cosine_ratio(config: WarmupCosineLR, iteration: int, warmup: int) -> float:
    if iteration < 0:
        return 0.0
    if iteration < warmup:
        return config.warmup_min_ratio + (1.0 - config.warmup_min_ratio) * _warm(iteration, warmup, config.warmup_type)
    done, total = iteration - warmup + 1, max(1, config.total_num_steps - warmup)
    ratio = (1 + math.cos(math.pi * min(done, total) / total)) / 2
    return max(0.0, config.cos_min_ratio + (1.0 - config.cos_min_ratio) * ratio)
