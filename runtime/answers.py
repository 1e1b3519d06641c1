"""What training scripts ask an engine, with DeepSpeed's names: nothing here changes or computes anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from torch import nn

from runtime.comm import Comm
from runtime.config import Resolved
from runtime.names import plain_name, plain_names
from runtime.optim.optimizer import ZeroOptimizer
from runtime.precision import Scaler
from runtime.setup import Session


class Answers:
    """The part of `Engine` that only looks at its state."""

    module: nn.Module
    config: Resolved
    optimizer: ZeroOptimizer
    comm: Comm
    session: Session
    scaler: Scaler
    global_steps: int
    optimizer_steps: int
    foreign_steps: int
    lr_factor: float
    _norm: float | None

    def train(self, mode: bool = True) -> Self:
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def local_rank(self) -> int:
        return self.session.local_rank

    @property
    def global_rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.config.global_batch

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters(recurse)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((plain_name(name), parameter) for name, parameter in self.module.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """The module's, by the names that it has when it is not compiled; at stage 3 copies in host memory, and every
        rank must call it."""
        return plain_names(self.module.state_dict())

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's mean gradient, before clipping; None before the first step."""
        return self._norm

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the next step, the run's factor included."""
        return [group["lr"] for group in self.optimizer.numbers(self.lr_factor)]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.config.accumulation

    def train_batch_size(self) -> int:
        return self.config.global_batch

    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def zero_optimization_stage(self) -> int:
        return self.config.stage

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that changed nothing, because a gradient was not finite."""
        return self.global_steps - self.optimizer_steps - self.foreign_steps

    @property
    def loss_scale(self) -> float:
        """Factor on the loss; 1 unless the precision is fp16."""
        return self.scaler.scale

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.config.stage > 0

    def fp16_enabled(self) -> bool:
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.config.precision == "bf16"
