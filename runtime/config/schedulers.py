"""The `scheduler` section: the numbers of DeepSpeed's schedules. The formulas are in runtime/optim/lr.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .errors import Findings
from .section import Flag, Int, Num, Section, number, wrong

DEEPSPEED_WARMUP_STEPS = 1000


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _rates(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _rate(value)
    if not value:
        raise wrong("a number, or a list with one for each parameter group", value)
    return tuple(map(_rate, value))


def _rate(value: Any) -> float:
    if (found := number(value)) < 0:
        raise wrong("at least 0", value)
    return found


NonNegative = Annotated[Num, Field(ge=0)]
Rates = Annotated[float | tuple[float, ...], BeforeValidator(_rates)]
"""A learning rate (or momentum) for all parameter groups, or a list with one for each."""
Steps = Annotated[Int, Field(ge=1)]
WarmupSteps = Annotated[Int, Field(ge=0)]
Shape = Annotated[Literal["log", "linear"], BeforeValidator(_lower)]


class _WarmupParams(Section):
    warmup_num_steps: WarmupSteps | None = None
    """Optimizer steps of warm-up. Unset: 1000 as in DeepSpeed, or a tenth of all steps when there are fewer than 1000;
    "auto": a tenth of all steps, or none when their number is not known."""
    warmup_type: Shape = "log"
    """How the learning rate grows: with the logarithm of the step, or linearly."""
    last_batch_iteration: Annotated[Int, Field(ge=-1)] = -1
    """The step to continue after; -1 starts from the beginning."""


class WarmupLRParams(_WarmupParams):
    """`scheduler.params` of WarmupLR: from warmup_min_lr to warmup_max_lr, then constant."""

    warmup_min_lr: Rates = 0.0
    """Learning rate at the first step; "auto" is 0."""
    warmup_max_lr: Rates | None = None
    """Learning rate after the warm-up. Unset or "auto": each parameter group's own lr."""


class WarmupDecayLRParams(WarmupLRParams):
    """`scheduler.params` of WarmupDecayLR: as WarmupLR, then linearly to 0 at total_num_steps."""

    warmup_max_lr: Rates | None = None
    """Learning rate after the warm-up. Unset: 0.001 as in DeepSpeed; "auto": each parameter group's own lr."""
    total_num_steps: Steps | None = None
    """Step at which the learning rate reaches 0. Unset or "auto": zerotop.train.steps."""


class WarmupCosineLRParams(_WarmupParams):
    """`scheduler.params` of WarmupCosineLR: ratios of the optimizer's lr, up to 1 and down a cosine."""

    total_num_steps: Steps | None = None
    """Step at which the cosine ends. Unset or "auto": zerotop.train.steps."""
    warmup_min_ratio: Annotated[Num, Field(ge=0, le=1)] = 0.0
    """Ratio at the first step."""
    cos_min_ratio: Annotated[Num, Field(ge=0, le=1)] = 0.0001
    """Ratio at the end."""


class OneCycleParams(Section):
    """`scheduler.params` of OneCycle: up from cycle_min_lr to cycle_max_lr, down again, then a decay. Momentum (the
    first of Adam's betas) goes the other way."""

    cycle_min_lr: Rates
    """Learning rate at the start and the end of the cycle."""
    cycle_max_lr: Rates
    """Learning rate in its middle."""
    decay_lr_rate: NonNegative = 0.0
    """After the cycle, the learning rate is divided by 1 + decay_lr_rate x decay intervals."""
    cycle_first_step_size: Annotated[Num, Field(gt=0)] = 2000.0
    """Steps of the half that goes up."""
    cycle_second_step_size: NonNegative | None = None
    """Steps of the half that goes down. Unset: as many."""
    cycle_first_stair_count: WarmupSteps = 0
    """Stairs of the half that goes up; 0: continuous."""
    cycle_second_stair_count: WarmupSteps | None = None
    """Stairs of the half that goes down. Unset: as many."""
    decay_step_size: NonNegative = 0.0
    """Steps of a decay interval; 0: no decay."""
    cycle_momentum: Flag = True
    """Whether momentum is cycled, where the optimizer has betas."""
    cycle_min_mom: Rates = 0.8
    """Momentum in the middle of the cycle."""
    cycle_max_mom: Rates = 0.9
    """Momentum at its start and end."""
    decay_mom_rate: NonNegative = 0.0
    """After the cycle, momentum is multiplied by 1 + decay_mom_rate x decay intervals."""
    last_batch_iteration: Annotated[Int, Field(ge=-1)] = -1
    """The step to continue after; -1 starts from the beginning."""


class LRRangeTestParams(Section):
    """`scheduler.params` of LRRangeTest: a learning rate that grows all the time, to find the largest that trains."""

    lr_range_test_min_lr: Rates = 1e-3
    """Learning rate at the first step."""
    lr_range_test_step_size: Steps = 2000
    """Steps of an interval."""
    lr_range_test_step_rate: NonNegative = 1.0
    """By which share of the first rate it grows in an interval."""
    lr_range_test_staircase: Flag = False
    """Whether it grows at once at the end of an interval."""
    last_batch_iteration: Annotated[Int, Field(ge=-1)] = -1
    """The step to continue after; -1 starts from the beginning."""


PARAMS: dict[str, type[Section]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}
"""Supported schedulers and the params each takes."""


class OneCycle(OneCycleParams):
    """OneCycle, complete."""

    type: Literal["OneCycle"] = "OneCycle"
    """Name of the schedule."""


class LRRangeTest(LRRangeTestParams):
    """LRRangeTest, complete."""

    type: Literal["LRRangeTest"] = "LRRangeTest"
    """Name of the schedule."""


class WarmupLR(Section):
    """WarmupLR, complete."""

    type: Literal["WarmupLR"] = "WarmupLR"
    """Name of the schedule."""
    warmup_min_lr: Rates
    """Learning rate at the first step."""
    warmup_max_lr: Rates | None
    """None: each parameter group's own."""
    warmup_num_steps: int
    """Optimizer steps of warm-up."""
    warmup_type: Literal["log", "linear"]
    """How the learning rate grows."""
    last_batch_iteration: int
    """The step to continue after; -1 starts from the beginning."""


class WarmupDecayLR(Section):
    """WarmupDecayLR, complete."""

    type: Literal["WarmupDecayLR"] = "WarmupDecayLR"
    """Name of the schedule."""
    warmup_min_lr: Rates
    """Learning rate at the first step."""
    warmup_max_lr: Rates | None
    """None: each parameter group's own."""
    warmup_num_steps: int
    """Optimizer steps of warm-up."""
    warmup_type: Literal["log", "linear"]
    """How the learning rate grows."""
    last_batch_iteration: int
    """The step to continue after; -1 starts from the beginning."""
    total_num_steps: int
    """Optimizer step at which the schedule ends."""


class WarmupCosineLR(Section):
    """WarmupCosineLR, complete."""

    type: Literal["WarmupCosineLR"] = "WarmupCosineLR"
    """Name of the schedule."""
    warmup_num_steps: int
    """Optimizer steps of warm-up."""
    warmup_type: Literal["log", "linear"]
    """How the learning rate grows."""
    last_batch_iteration: int
    """The step to continue after; -1 starts from the beginning."""
    total_num_steps: int
    """Optimizer step at which the schedule ends."""
    warmup_min_ratio: float
    """Ratio to the base learning rate at the first step."""
    cos_min_ratio: float
    """Ratio to the base learning rate at the end."""


AnySchedule = WarmupLR | WarmupDecayLR | WarmupCosineLR | OneCycle | LRRangeTest
SchedulerConfig = Annotated[AnySchedule, Field(discriminator="type")]


class SchedulerSection(Section):
    """The `scheduler` section as it stands in the file, checked."""

    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]
    """Name of the schedule."""
    params: WarmupLRParams | WarmupDecayLRParams | WarmupCosineLRParams | OneCycleParams | LRRangeTestParams
    """The schedule's own settings."""

    def resolve(
        self, found: Findings, *, lr: float | None, steps: int | None, auto: set[str], notes: list[str]
    ) -> AnySchedule | None:
        """The complete schedule, or None after a problem was recorded.

        `lr`: the optimizer's, None when a script brings its own; `steps`: all optimizer steps, None when not known;
        `auto`: the params that are "auto" in the file.
        """
        params = self.params
        if isinstance(params, OneCycleParams):
            return OneCycle(**params.model_dump())
        if isinstance(params, LRRangeTestParams):
            return LRRangeTest(**params.model_dump())
        total = None if self.type == "WarmupLR" else _total(params, steps, notes)
        if self.type != "WarmupLR" and total is None:
            found.problem(
                ("scheduler", "params", "total_num_steps"),
                ": how many steps there are is up to the script; give the number here or as zerotop.train.steps",
            )
            return None
        span = total if total is not None else steps
        warmup = params.warmup_num_steps
        if warmup is None:
            warmup = _warmup_steps("warmup_num_steps" in auto, span, notes)
        if total is not None and warmup > total:
            notes.append(f"scheduler: the warm-up of {warmup} steps is longer than total_num_steps = {total}")
        common: dict[str, Any] = {
            "warmup_num_steps": warmup,
            "warmup_type": params.warmup_type,
            "last_batch_iteration": params.last_batch_iteration,
        }
        if isinstance(params, WarmupCosineLRParams):
            return WarmupCosineLR(
                total_num_steps=total or 0,
                warmup_min_ratio=params.warmup_min_ratio,
                cos_min_ratio=params.cos_min_ratio,
                **common,
            )
        top: Any = params.warmup_max_lr
        if top is None and isinstance(params, WarmupDecayLRParams) and "warmup_max_lr" not in auto:
            top = 1e-3
            notes.append("scheduler.params.warmup_max_lr: unset, 0.001 as in DeepSpeed")
        elif top is None:
            given = f", {lr:g} unless a group says otherwise" if lr is not None else ""
            notes.append(f"scheduler.params.warmup_max_lr: each parameter group's own lr{given}")
        common |= {"warmup_min_lr": params.warmup_min_lr, "warmup_max_lr": top}
        return WarmupDecayLR(total_num_steps=total, **common) if total is not None else WarmupLR(**common)


def _total(params: _WarmupParams, steps: int | None, notes: list[str]) -> int | None:
    given: int | None = getattr(params, "total_num_steps", None)
    if given is None and steps is not None:
        notes.append(f"scheduler.params.total_num_steps: {steps}, as zerotop.train.steps")
    return steps if given is None else given


def _warmup_steps(auto: bool, span: int | None, notes: list[str]) -> int:
    """`span`: all steps when their number is known."""
    if span is None:
        steps, why = (0, "no steps known to take a share of") if auto else (DEEPSPEED_WARMUP_STEPS, "as in DeepSpeed")
    elif auto or span <= DEEPSPEED_WARMUP_STEPS:
        steps, why = span // 10, f"a tenth of {span} steps"
    else:
        steps, why = DEEPSPEED_WARMUP_STEPS, "as in DeepSpeed"
    notes.append(f"scheduler.params.warmup_num_steps: {steps}, {why}")
    return steps
