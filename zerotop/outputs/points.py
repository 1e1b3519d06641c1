"""What experiment trackers get: one point per optimizer step and evaluation, with names that group well."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from runtime.config import Resolved
from runtime.wire.base import Message
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import Hello, StepResult
from zerotop.alerts.metrics import vram_bytes
from zerotop.state.efficiency import efficiency_of
from zerotop.state.evaluations import perplexity
from zerotop.state.run import RunState


@dataclass(frozen=True)
class Point:
    """Figures at the end of an optimizer step."""

    step: int
    wall_s: float
    values: dict[str, float]


class Points:
    """The points of a run, from its messages. Each step is there once: those that a restart replays give the same
    figures again."""

    def __init__(self, last_step: int = 0) -> None:
        """`last_step`: what an earlier process has written."""
        self.last_step = last_step
        self._last_evaluation_s = 0.0
        self._seen: RunState | None = None

    def new(self, state: RunState, messages: Iterable[Message]) -> Iterator[Point]:
        """The points that `messages`, which have been folded into `state`, bring. After a new start of the connection
        the state is another one, and its curve fills the gap."""
        steps: list[StepResult] = []
        evaluations: list[Evaluation] = []
        if state is not self._seen:
            self._seen = state
            steps += state.series
            evaluations += state.evaluations
        for message in messages:
            if isinstance(message, StepResult):
                steps.append(message)
            elif isinstance(message, Evaluation):
                evaluations.append(message)
        lowest = min(state.ranks, default=0)
        for step in steps:
            if step.rank == lowest and step.step > self.last_step:
                self.last_step = step.step
                yield Point(step.step, _wall_s(step), _of_step(step, state))
        for evaluation in evaluations:
            if evaluation.wall_s > self._last_evaluation_s:
                self._last_evaluation_s = evaluation.wall_s
                if evaluation.loss is not None:
                    yield Point(evaluation.step, evaluation.wall_s, _of_evaluation(evaluation))


def _wall_s(step: StepResult) -> float:
    """Its end by the wall clock; now, if the monotonic clock of the rank is another than ours."""
    now_s, ago_s = time.time(), (time.monotonic_ns() - step.end_ns) / 1e9
    return now_s - ago_s if 0 <= ago_s < 3600 else now_s


def _of_step(step: StepResult, state: RunState) -> dict[str, float]:
    tokens_per_s = state.series.tokens_per_s if state.series.ranks_reporting >= state.world_size else None
    values = {
        "train/loss": step.loss,
        "train/learning_rate": step.lr,
        "train/grad_norm": step.grad_norm,
        "train/loss_scale": step.loss_scale,
        "train/skipped_steps": float(step.skipped_steps) if step.skipped_steps else None,
        "speed/step_s": step.step_ms / 1000,
        "speed/wait_s": step.wait_ms / 1000,
        "speed/tokens_per_s": tokens_per_s,
        "speed/mfu": efficiency_of(state.hello, step.tokens_per_s).mfu,
        **_memory(state),
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _memory(state: RunState) -> dict[str, float | None]:
    """The fullest GPU and the largest process: what decides whether the run goes on."""
    used = [size for rank in state.ranks.values() if (size := vram_bytes(state, rank)[0]) is not None]
    sizes = [rank.memory.rss_bytes for rank in state.ranks.values() if rank.memory is not None]
    return {
        "memory/vram_max_bytes": max(used, default=None),
        "memory/rss_max_bytes": max(sizes, default=None),
    }


def _of_evaluation(evaluation: Evaluation) -> dict[str, float]:
    assert evaluation.loss is not None
    values = {"eval/loss": evaluation.loss, "eval/perplexity": perplexity(evaluation.loss)}
    return {name: value for name, value in values.items() if value is not None}


def hyperparameters(resolved: Resolved, hello: Hello | None) -> dict[str, Any]:
    """What a tracker lists beside the curves: settings that make runs differ, without paths and secrets."""
    settings: dict[str, Any] = {
        "world_size": resolved.world_size,
        "device": resolved.device,
        "zero_stage": resolved.stage,
        "precision": resolved.precision,
        "micro_batch": resolved.micro_batch,
        "gradient_accumulation": resolved.accumulation,
        "global_batch": resolved.global_batch,
        "gradient_clipping": resolved.gradient_clipping,
        "seed": resolved.zerotop.train.seed,
        "offload_optimizer": resolved.offload_optimizer is not None,
        "offload_param": resolved.offload_param is not None,
    }
    if resolved.optimizer is not None:
        settings |= {"optimizer": resolved.optimizer.type, "learning_rate": resolved.optimizer.lr}
        settings["weight_decay"] = resolved.optimizer.weight_decay
    if resolved.scheduler is not None:
        settings["scheduler"] = resolved.scheduler.type
    if hello is not None:
        settings |= {"model": hello.model_name.rstrip("/").rpartition("/")[2], "parameters": hello.parameters}
        settings |= {"seq_len": hello.seq_len, "steps": hello.steps, "torch": hello.torch_version}
    return {name: value for name, value in settings.items() if value is not None}
