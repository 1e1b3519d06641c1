"""DeepSpeed's learning-rate schedules, step for step (deepspeed/runtime/lr_schedules.py, v0.19).

Like DeepSpeed's they count iterations from -1, so the first optimizer step runs at the schedule's start, and a schedule
is advanced after each optimizer step. They set every parameter group's learning rate from its own bounds. Each is a
function of the iteration alone: only the iteration is saved, and a schedule whose settings have changed continues at
the same iteration with the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from runtime.config import SchedulerConfig

LOG, LINEAR = "log", "linear"
SECOND_BETA = 0.99
"""Adam's second beta under OneCycle, as in DeepSpeed."""
Bound = float | Sequence[float]
"""A number for all parameter groups, or one for each."""


class Schedule:
    """Sets the learning rate of every parameter group. Call `step()` after each optimizer step."""

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1) -> None:
        self.optimizer = _torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        """The learning rate of each group before this schedule sets any."""

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        raise NotImplementedError

    def get_mom(self) -> list[tuple[float, float]] | None:
        """(beta1, beta2) of each group at `last_batch_iteration`; None if the schedule does not change them."""
        return None

    def get_last_lr(self) -> list[float]:
        """The current learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advance by one iteration, or to `last_batch_iteration`."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The iteration, for a checkpoint."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the iteration of `state`, and set its learning rates."""
        # Early versions of zerotop called it "iteration".
        self.last_batch_iteration = int(
            state["last_batch_iteration" if "last_batch_iteration" in state else "iteration"]
        )
        self._set()

    def _set(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas

    def _each(self, bound: Bound, name: str) -> list[float]:
        """One bound for each parameter group. Raises ValueError if `bound` is a list of another length."""
        groups = len(self.optimizer.param_groups)
        if not isinstance(bound, Sequence):
            return [float(bound)] * groups
        if len(bound) != groups:
            raise ValueError(
                f"{name}: expected one number, or one for each of {groups} parameter groups, got {len(bound)}"
            )
        return [float(one) for one in bound]


class _Warmup(Schedule):
    def __init__(self, optimizer: Any, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if isinstance(warmup_num_steps, bool) or not isinstance(warmup_num_steps, int) or warmup_num_steps < 0:
            raise ValueError(f"warmup_num_steps: expected a whole number of steps, got {warmup_num_steps!r}")
        if warmup_type not in (LOG, LINEAR):
            raise ValueError(f'warmup_type: expected "log" or "linear", got {warmup_type!r}')
        self.warmup_num_steps, self.warmup_type = max(2, warmup_num_steps), warmup_type

    def _warm(self) -> float:
        """Progress of the warm-up, from 0 to 1."""
        iteration, steps = self.last_batch_iteration, self.warmup_num_steps
        if iteration >= steps:
            return 1.0
        return iteration / steps if self.warmup_type == LINEAR else math.log(iteration + 1) / math.log(steps)


class WarmupLR(_Warmup):
    """From warmup_min_lr to warmup_max_lr (default: each group's own lr), then constant."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Bound = 0.0,
        warmup_max_lr: Bound | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = LOG,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.min_lrs = self._each(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = self.base_lrs if warmup_max_lr is None else self._each(warmup_max_lr, "warmup_max_lr")
        self._set()

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        if self.last_batch_iteration < 0:
            return list(self.min_lrs)
        gamma = self._gamma()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _gamma(self) -> float:
        return self._warm()


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then linearly to 0 at total_num_steps."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: Bound = 0.0,
        warmup_max_lr: Bound | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = LOG,
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )  # fmt: skip

    def _gamma(self) -> float:
        if self.last_batch_iteration < self.warmup_num_steps:
            return self._warm()
        left, span = self.total_num_steps - self.last_batch_iteration, self.total_num_steps - self.warmup_num_steps
        return max(0.0, left / max(1.0, span))


class WarmupCosineLR(_Warmup):
    """Scales each group's own lr: from warmup_min_ratio up to 1, then down a cosine to cos_min_ratio."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = LOG,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self._set()

    def get_lr_ratio(self) -> float:
        """The factor on each group's own lr at `last_batch_iteration`."""
        iteration, warmup = self.last_batch_iteration, self.warmup_num_steps
        if iteration < 0:
            return 0.0
        if iteration < warmup:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._warm()
        done, total = iteration - warmup + 1, max(1, self.total_num_steps - warmup)
        ratio = (1 + math.cos(math.pi * min(1.0, done / total))) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * ratio)

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        ratio = self.get_lr_ratio()
        return [base * ratio for base in self.base_lrs]


class LRRangeTest(Schedule):
    """Starts at lr_range_test_min_lr and adds lr_range_test_step_rate times that every lr_range_test_step_size
    steps."""

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Bound = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if lr_range_test_step_size <= 0:
            raise ValueError(f"lr_range_test_step_size: expected at least one step, got {lr_range_test_step_size}")
        self.min_lr = self._each(lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size, self.step_rate = lr_range_test_step_size, lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._set()

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        intervals = (self.last_batch_iteration + 1) / self.step_size
        factor = 1 + self.step_rate * (math.floor(intervals) if self.staircase else intervals)
        return [low * factor for low in self.min_lr]


class OneCycle(Schedule):
    """The 1cycle policy (arXiv 1803.09820): up from cycle_min_lr to cycle_max_lr and down again, then a decay.

    Momentum, the first of Adam's betas, goes down and up instead; optimizers without betas keep theirs.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Bound,
        cycle_max_lr: Bound,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Bound = 0.8,
        cycle_max_mom: Bound = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.first_step_size = float(cycle_first_step_size)
        self.second_step_size = (
            self.first_step_size if cycle_second_step_size is None else float(cycle_second_step_size)
        )
        if self.first_step_size <= 0 or self.second_step_size < 0:
            raise ValueError(
                "cycle_first_step_size: expected more than 0 steps, and cycle_second_step_size no fewer than 0; got "
                f"{cycle_first_step_size} and {cycle_second_step_size}"
            )
        self.total_size = self.first_step_size + self.second_step_size
        self.step_ratio = self.first_step_size / self.total_size
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.min_lrs = self._each(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._each(cycle_max_lr, "cycle_max_lr")
        self.cycle_momentum = cycle_momentum and "betas" in self.optimizer.defaults
        self.min_moms = self._each(cycle_min_mom, "cycle_min_mom")
        self.max_moms = self._each(cycle_max_mom, "cycle_max_mom")
        self._set()

    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""
        if self.last_batch_iteration < 0:
            return list(self.min_lrs)
        if self.last_batch_iteration < self.total_size:
            scale = self._scale()
            return [low + (high - low) * scale for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        factor = 1 + self.decay_lr_rate * self._decay_intervals()
        return [low / factor for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Betas of each group at `last_batch_iteration`; None if the schedule leaves them alone."""
        if not self.cycle_momentum:
            return None
        if self.last_batch_iteration < self.total_size:
            scale = self._scale()
            moms = [high - (high - low) * scale for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            factor = 1 + self.decay_mom_rate * self._decay_intervals()
            moms = [high * factor for high in self.max_moms]
        return [(mom, SECOND_BETA) for mom in moms]

    def _set(self) -> None:
        super()._set()
        if self.cycle_momentum and self.last_batch_iteration < 0:  # DeepSpeed's first step has the lower bound
            for group, mom in zip(self.optimizer.param_groups, self.min_moms, strict=True):
                group["betas"] = (mom, SECOND_BETA)

    def _scale(self) -> float:
        """Height of the next step on the cycle: 0 at cycle_min_lr, 1 at cycle_max_lr."""
        iteration = self.last_batch_iteration + 1
        within = 1.0 + iteration / self.total_size - math.floor(1 + iteration / self.total_size)
        rising = within <= self.step_ratio
        stairs = self.first_stair_count if rising else self.second_stair_count
        if not stairs:
            return within / self.step_ratio if rising else (within - 1) / (self.step_ratio - 1)
        # Whole steps: the fraction at the end of a half may be just below a stair.
        step = iteration % self.total_size
        if step <= self.first_step_size:
            return math.floor(step * stairs / self.first_step_size) / stairs
        return math.floor((self.total_size - step) * stairs / self.second_step_size) / stairs

    def _decay_intervals(self) -> float:
        if not self.decay_step_size:
            return 0.0
        return (self.last_batch_iteration - self.total_size + 1) / self.decay_step_size


SCHEDULES: dict[str, type[Schedule]] = {
    "LRRangeTest": LRRangeTest,
    "OneCycle": OneCycle,
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}


def schedule_from_config(optimizer: torch.optim.Optimizer, config: SchedulerConfig) -> Schedule:
    """Make the schedule of the config's `scheduler` section. Raises ValueError if its settings don't fit the
    optimizer's groups."""
    numbers = config.model_dump()
    return SCHEDULES[numbers.pop("type")](optimizer, **numbers)


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """`optimizer` itself, or the torch optimizer that it wraps."""
    inner = getattr(optimizer, "optimizer", None)
    for candidate in (optimizer, inner):
        if isinstance(candidate, torch.optim.Optimizer):
            return candidate
    raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
