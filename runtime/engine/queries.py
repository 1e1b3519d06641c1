"""What training scripts ask an engine, with DeepSpeed's names: nothing here changes or computes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from runtime.checkpoint.registered import ScriptState
from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine.session import Session
from runtime.engine.step import OptimizerSteps
from runtime.models.names import plain_name, plain_names
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.precision import DTYPES
from runtime.state.train_state import TrainState


class EngineQueries(nn.Module):
    """The part of `Engine` that only looks at its state: a module around the model, as DeepSpeed's engine is.

    What DeepSpeed chooses and zerotop does not (see the notes that initialize() gives about keys without effect) is
    answered as it is here.
    """

    module: nn.Module

    def __init__(self, state: TrainState, session: Session) -> None:
        super().__init__()
        self.module = state.module
        self.__dict__["module"] = state.module  # found without going through nn.Module.__getattr__
        self.state, self.session, self.script = state, session, ScriptState()
        self.training_dataloader: Any = None
        """What initialize(training_data=...) returned."""
        self.steps: OptimizerSteps
        self._stepped = False
        """Whether the last step() was at a boundary."""

    # ---- its parts ---------------------------------------------------------------------------------------------------
    @property
    def config(self) -> Resolved:
        return self.state.config

    @property
    def comm(self) -> Comm:
        return self.state.comm

    @property
    def optimizer(self) -> ZeroOptimizer:
        return self.state.optimizer

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def lr_scheduler(self) -> Any:
        return self.state.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.state.lr_scheduler = scheduler

    @property
    def global_steps(self) -> int:
        """Optimizer steps, skipped ones included: what progress and checkpoints count."""
        return self.state.counters.global_steps

    @global_steps.setter
    def global_steps(self, steps: int) -> None:
        self.state.counters.global_steps = steps

    @property
    def optimizer_steps(self) -> int:
        """Updates really taken: Adam's bias correction counts these."""
        self.state.settle_step()
        return self.state.counters.optimizer_steps

    @property
    def micro_steps(self) -> int:
        return self.state.accumulation.micro_steps

    @micro_steps.setter
    def micro_steps(self, steps: int) -> None:
        self.state.accumulation.micro_steps = steps

    # ---- state -------------------------------------------------------------------------------------------------------
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

    def state_dict(  # type: ignore[override]
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
        return self.steps.last.grad_norm if self.steps.last is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the next step, the run's factor included."""
        self.state.settle_step()
        return [group["lr"] for group in self.optimizer.hyperparameters(self.state.counters.lr_factor)]

    def get_mom(self) -> list[Any]:
        """Each parameter group's betas, or its momentum."""
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last step() changed the parameters: false between boundaries, and where it was skipped because a
        gradient was not finite."""
        return self._stepped and self.steps.last is not None and not self.steps.last.skipped

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that changed nothing, because a gradient was not finite."""
        self.state.settle_step()
        return self.state.counters.skipped_steps

    @property
    def loss_scale(self) -> float:
        """Factor on the loss; 1 unless the precision is fp16."""
        self.state.settle_step()
        return self.state.scaler.scale

    @property
    def client_lr_scheduler(self) -> Any:
        """The scheduler that the script gave to initialize(), if it did."""
        return self.lr_scheduler if self.config.scheduler is None else None

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """None: gradients land in dense flat memory."""
        return set()

    # ---- the batch ---------------------------------------------------------------------------------------------------
    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.config.accumulation

    def train_batch_size(self) -> int:
        return self.config.global_batch

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return self.config.global_batch, self.config.micro_batch, self.config.accumulation

    # ---- ZeRO --------------------------------------------------------------------------------------------------------
    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.config.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.config.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.config.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.config.stage >= 3

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states are in host memory."""
        return self.config.offload_optimizer is not None

    zero_use_cpu_optimizer = zero_cpu_offload

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Always: save_16bit_model() gathers whatever the key says."""
        return True

    def zero_param_persistence_threshold(self) -> int:
        return self.config.persistence_threshold

    # ---- numbers -----------------------------------------------------------------------------------------------------
    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def fp16_enabled(self) -> bool:
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.config.precision == "bf16"

    def amp_enabled(self) -> bool:
        """Never: a config that asks for Apex is refused."""
        return False

    def torch_autocast_enabled(self) -> bool:
        """Never: a config that asks for it is refused."""
        return False

    def dynamic_loss_scale(self) -> bool:
        return self.config.precision == "fp16" and self.config.fp16.loss_scale == 0

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype that the model computes in, dtype that gradients accumulate in)."""
        return DTYPES[self.config.precision], DTYPES[self.config.grad_accum_dtype]

    @property
    def communication_data_type(self) -> torch.dtype:
        """In which gradients are reduced."""
        if self.config.communication_data_type is not None:
            return DTYPES[self.config.communication_data_type]
        return DTYPES[self.config.precision if self.config.stage >= 2 else self.config.grad_accum_dtype]

    def postscale_gradients(self) -> bool:
        return not self.config.prescale_gradients

    def gradient_predivide_factor(self) -> float:
        return self.config.gradient_predivide_factor

    # ---- optimizer and schedule --------------------------------------------------------------------------------------
    def optimizer_name(self) -> str | None:
        """Of the config's optimizer, in lower case as DeepSpeed has it; of the script's own, its class."""
        if not self.optimizer.trains:
            return None
        return self.optimizer.kind if self.config.optimizer is None else self.config.optimizer.type.lower()

    def optimizer_params(self) -> dict[str, Any] | None:
        return self.config.optimizer.torch_kwargs() if self.config.optimizer is not None else None

    def scheduler_name(self) -> str | None:
        """Of the config's scheduler; None where there is none, or the script brought one."""
        return self.config.scheduler.type if self.config.scheduler is not None else None

    def dataloader_drop_last(self) -> bool:
        return self.config.dataloader_drop_last

    # ---- what is printed ---------------------------------------------------------------------------------------------
    def steps_per_print(self) -> int:
        """Steps between two progress lines: zerotop.log.interval."""
        return self.config.zerotop.log.interval

    def wall_clock_breakdown(self) -> bool:
        """Always: times are always measured, and the screen shows them."""
        return True

    @property
    def is_compiled(self) -> bool:
        return hasattr(self.module, "_orig_mod") or self.module._compiled_call_impl is not None
