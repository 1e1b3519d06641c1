"""What training scripts ask an engine, with DeepSpeed's names: nothing here changes or computes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch.distributed as dist
from torch import nn

from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine.setup import Session
from runtime.models.names import plain_name, plain_names
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.precision import Scaler


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
    lr_scheduler: Any
    _stepped: bool
    _norm: float | None

    def train(self, mode: bool = True) -> Self:
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    @property
    def training(self) -> bool:
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """torch sets this flag of each module by itself, in train() and at the start; the model's is the one that
        counts."""

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

    @property
    def dp_world_size(self) -> int:
        """Ranks over which the data are split: all of them."""
        return self.comm.world_size

    @property
    def mp_world_size(self) -> int:
        """Ranks over which the model is split: it is not."""
        return 1

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD

    seq_data_parallel_group = data_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.comm.rank

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's, by the names that it has when it is not compiled."""
        before = f"{prefix}." if prefix else ""
        named = self.module.named_parameters(recurse=recurse, remove_duplicate=remove_duplicate)
        return ((before + plain_name(name), parameter) for name, parameter in named)

    def state_dict(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's, by the names that it has when it is not compiled; at stage 3 copies in host memory, and every
        rank must call it."""
        found = plain_names(self.module.state_dict(keep_vars=keep_vars))
        into: dict[str, Any] = {} if destination is None else destination
        into.update({prefix + name: value for name, value in found.items()})
        return into

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's, by the names of `state_dict()`; every rank must call it."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        names = {plain_name(n): n for n, _ in (*parameters, *self.module.named_buffers(remove_duplicate=False))}
        mine = {names.get(plain_name(name), name): value for name, value in state_dict.items()}
        return self.module.load_state_dict(mine, strict=strict, assign=assign)

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's mean gradient, before clipping; None before the first step."""
        return self._norm

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the next step, the run's factor included."""
        return [group["lr"] for group in self.optimizer.numbers(self.lr_factor)]

    def get_mom(self) -> list[Any]:
        """Each parameter group's betas, or its momentum."""
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last step() changed the parameters: false between boundaries, and where it was skipped because a
        gradient was not finite."""
        return self._stepped

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that changed nothing, because a gradient was not finite."""
        return self.global_steps - self.optimizer_steps - self.foreign_steps

    @property
    def loss_scale(self) -> float:
        """Factor on the loss; 1 unless the precision is fp16."""
        return self.scaler.scale

    @property
    def client_lr_scheduler(self) -> Any:
        """The scheduler that the script gave to initialize(), if it did."""
        return self.lr_scheduler if self.config.scheduler is None else None

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """None: gradients land in dense flat memory."""
        return set()
