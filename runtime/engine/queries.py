"""The part of the engine's DeepSpeed API that changes nothing: settings, counters, the wrapped module, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.checkpoint.content.registered import ScriptState
from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine.deepspeed_config import DeepSpeedConfig
from runtime.engine.loaders import loader_of
from runtime.engine.monitor import ScriptMonitor
from runtime.engine.session import Session
from runtime.engine.step import OptimizerSteps
from runtime.engine.timers import ThroughputTimer, TimerSettings
from runtime.models.names import plain_name, plain_names
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.precision import DTYPES
from runtime.state.train_state import TrainState


class EngineQueries(nn.Module):
    """The base of `Engine`: a module around the model, as in DeepSpeed, with read-only queries.

    Queries about settings that have no effect in zerotop (see the notes at launch) return what zerotop does.
    """

    module: nn.Module

    def __init__(self, state: TrainState, session: Session) -> None:
        super().__init__()
        self.module = state.module
        self.__dict__["module"] = state.module  # bypasses nn.Module.__getattr__
        self.state, self.session, self.script = state, session, ScriptState()
        self.training_dataloader: Any = None
        """The loader that initialize(training_data=...) returned, if any."""
        self.steps: OptimizerSteps
        self.monitor = ScriptMonitor(session.rank)
        self.tput_timer = ThroughputTimer(TimerSettings(synchronized=False), state.config.global_batch)
        self._stepped = False
        """Whether the last step() was at a boundary."""

    # ---- parts -------------------------------------------------------------------------------------------------------
    @property
    def config(self) -> Resolved:
        """The resolved config."""
        return self.state.config

    @property
    def _config(self) -> DeepSpeedConfig:
        """The config by DeepSpeed's names, which scripts read although the underscore says otherwise."""
        return DeepSpeedConfig.of(self.config)

    @property
    def comm(self) -> Comm:
        """The communicator of all ranks."""
        return self.state.comm

    @property
    def optimizer(self) -> ZeroOptimizer:
        """The ZeRO optimizer; its parameter groups are the script's."""
        return self.state.optimizer

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.state.device

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler that the engine steps; None without one."""
        return self.state.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.state.lr_scheduler = scheduler

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken, skipped ones included; progress and checkpoints count these."""
        return self.state.counters.global_steps

    @global_steps.setter
    def global_steps(self, steps: int) -> None:
        self.state.counters.global_steps = steps

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that updated parameters, which Adam's bias correction counts."""
        self.state.settle_step()
        return self.state.counters.optimizer_steps

    @property
    def micro_steps(self) -> int:
        """Micro-steps taken in total."""
        return self.state.accumulation.micro_steps

    @micro_steps.setter
    def micro_steps(self, steps: int) -> None:
        self.state.accumulation.micro_steps = steps

    # ---- state -------------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Self:
        """Set the model to training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Set the model to evaluation mode."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignored: torch sets this flag on every module, but only the model's own counts."""

    @property
    def local_rank(self) -> int:
        """Rank within this host."""
        return self.session.local_rank

    @property
    def global_rank(self) -> int:
        """Rank among all ranks."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.comm.world_size

    @property
    def global_samples(self) -> int:
        """Samples trained over all ranks, at the current batch size."""
        if not self.config.managed_accumulation:
            return self.micro_steps * self.config.micro_batch * self.comm.world_size
        return self.global_steps * self.config.global_batch

    @property
    def dp_world_size(self) -> int:
        """Number of data-parallel ranks: all ranks."""
        return self.comm.world_size

    @property
    def mp_world_size(self) -> int:
        """Number of model-parallel ranks: always 1."""
        return 1

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks."""
        return dist.group.WORLD

    seq_data_parallel_group = data_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Rank among the data-parallel ranks, which are all ranks."""
        return self.comm.rank

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self.module.parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters, by the names of the uncompiled model."""
        before = f"{prefix}." if prefix else ""
        named = self.module.named_parameters(recurse=recurse, remove_duplicate=remove_duplicate)
        return ((before + plain_name(name), parameter) for name, parameter in named)

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's full state_dict, by the names of the uncompiled model; at stage 3 copies in host memory, and
        collective."""
        found = plain_names(self.module.state_dict(keep_vars=keep_vars))
        into: dict[str, Any] = {} if destination is None else destination
        into.update({prefix + name: value for name, value in found.items()})
        return into

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model's state_dict, by the names of `state_dict()`. Collective."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        names = {plain_name(n): n for n, _ in (*parameters, *self.module.named_buffers(remove_duplicate=False))}
        mine = {names.get(plain_name(name), name): value for name, value in state_dict.items()}
        return self.module.load_state_dict(mine, strict=strict, assign=assign)

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's mean gradient, before clipping; None before the first step."""
        return self.steps.last.grad_norm if self.steps.last is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the next step, including the knob lr_factor."""
        self.state.settle_step()
        return [group["lr"] for group in self.optimizer.hyperparameters(self.state.counters.lr_factor)]

    def get_mom(self) -> list[Any]:
        """The betas or momentum of each parameter group."""
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last step() updated the parameters: False between boundaries, and for a step skipped because its
        gradients were not finite."""
        return self._stepped and self.steps.last is not None and not self.steps.last.skipped

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped because their gradients were not finite."""
        self.state.settle_step()
        return self.state.counters.skipped_steps

    @property
    def loss_scale(self) -> float:
        """Factor on the loss; 1 unless the precision is fp16."""
        self.state.settle_step()
        return self.state.scaler.scale

    @property
    def client_lr_scheduler(self) -> Any:
        """The scheduler that the script passed to initialize(), if any."""
        return self.lr_scheduler if self.config.scheduler is None else None

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Always empty: gradients are dense."""
        return set()

    # ---- the batch ---------------------------------------------------------------------------------------------------
    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per rank and micro-step."""
        return self.config.micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self.config.accumulation

    def managed_gradient_accumulation(self) -> bool:
        """Whether step() counts micro-steps; False: every step() ends the accumulation."""
        return self.config.managed_accumulation

    def train_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.config.global_batch

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return self.config.global_batch, self.config.micro_batch, self.config.accumulation

    # ---- ZeRO --------------------------------------------------------------------------------------------------------
    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.config.stage > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.config.stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded: stages 2 and 3."""
        return self.config.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded: stage 3."""
        return self.config.stage >= 3

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states are in host memory."""
        return self.config.offload_optimizer is not None

    zero_use_cpu_optimizer = zero_cpu_offload

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Always True: save_16bit_model() unshards the weights whatever the key says."""
        return True

    def zero_param_persistence_threshold(self) -> int:
        """Parameters with fewer elements are never sharded."""
        return self.config.persistence_threshold

    # ---- numbers -----------------------------------------------------------------------------------------------------
    def gradient_clipping(self) -> float:
        """The largest global gradient norm; 0: no clipping."""
        return self.config.gradient_clipping

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self.config.precision == "bf16"

    def amp_enabled(self) -> bool:
        """Always False: a config with Apex enabled is refused."""
        return False

    def torch_autocast_enabled(self) -> bool:
        """Always False: a config with torch_autocast enabled is refused."""
        return False

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is found while training (fp16 with loss_scale 0)."""
        return self.config.precision == "fp16" and self.config.fp16.loss_scale == 0

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(compute dtype of the model, dtype of gradient accumulation)."""
        return DTYPES[self.config.precision], DTYPES[self.config.grad_accum_dtype]

    @property
    def communication_data_type(self) -> torch.dtype:
        """The dtype in which gradients are reduced."""
        if self.config.communication_data_type is not None:
            return DTYPES[self.config.communication_data_type]
        return DTYPES[self.config.precision if self.config.stage >= 2 else self.config.grad_accum_dtype]

    def postscale_gradients(self) -> bool:
        """Whether gradients are averaged after the reduction (prescale_gradients is false)."""
        return not self.config.prescale_gradients

    def gradient_predivide_factor(self) -> float:
        """Factor that gradients are divided by before the reduction."""
        return self.config.gradient_predivide_factor

    # ---- optimizer and schedule --------------------------------------------------------------------------------------
    def optimizer_name(self) -> str | None:
        """Name of the config's optimizer in lower case, as in DeepSpeed, or class name of the script's own."""
        if not self.optimizer.trains:
            return None
        return self.optimizer.kind if self.config.optimizer is None else self.config.optimizer.type.lower()

    def optimizer_params(self) -> dict[str, Any] | None:
        """Parameters of the config's optimizer; None without one."""
        return self.config.optimizer.torch_kwargs() if self.config.optimizer is not None else None

    def scheduler_name(self) -> str | None:
        """Name of the config's scheduler; None without one."""
        return self.config.scheduler.type if self.config.scheduler is not None else None

    def dataloader_drop_last(self) -> bool:
        """Whether the loader of initialize() leaves out an incomplete last batch."""
        return self.config.dataloader_drop_last

    # ---- reporting ---------------------------------------------------------------------------------------------------
    def log_level(self) -> str | None:
        """The config's log_level in capitals; None without one."""
        return self.config.log_level.upper() if self.config.log_level is not None else None

    def steps_per_print(self) -> int:
        """Optimizer steps between two progress lines: zerotop.log.interval."""
        return self.config.zerotop.log.interval

    def wall_clock_breakdown(self) -> bool:
        """Always True: times are always measured, and the screen shows them."""
        return True

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled by torch."""
        return hasattr(self.module, "_orig_mod") or self.module._compiled_call_impl is not None

    # ---- accumulation and states -------------------------------------------------------------------------------------
    @property
    def _micro_step(self) -> int:
        return self.state.accumulation.micro_step(self.gradient_accumulation_steps())

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-step is the last one of the accumulation."""
        return self.state.accumulation.is_boundary(self.gradient_accumulation_steps())

    def synchronize(self) -> None:
        """Wait for the last step's update, which with offload may still run after step(). For scripts that read
        parameters or optimizer states themselves."""
        self.state.synchronize()

    def masters(self) -> list[torch.Tensor]:
        """This rank's master weights: for each trained flat parameter group in forward order, (numel of the state
        shard,) fp32, not a copy."""
        self.synchronize()
        return [flat.masters for flat in self.state.flats]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an engine can't be copied or pickled: copy or save engine.module instead (inside "
            "zero.GatheredParameters(engine.module)), or call engine.save_checkpoint()"
        )

    # ---- the module's attributes -------------------------------------------------------------------------------------
    if not TYPE_CHECKING:  # __getattr__ would hide misspelt attributes from type checkers

        def __getattr__(self, name: str) -> Any:
            """Fall back to attributes of the module."""
            if name.startswith("__") or "module" not in self.__dict__:
                raise AttributeError(name)
            for own in ("_parameters", "_buffers", "_modules"):
                if name in self.__dict__[own]:
                    return self.__dict__[own][name]
            try:
                return getattr(self.__dict__["module"], name)
            except AttributeError:
                raise AttributeError(
                    f"neither the engine nor its module ({type(self.module).__name__}) has an attribute {name!r}"
                ) from None

    # ---- loaders, and calls without effect ---------------------------------------------------------------------------
    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Does nothing, for compatibility: engine.backward(loss) has reduced the gradients."""

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Sampler[Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """Make a loader of `dataset`. route "train": each rank's share in another order each epoch, continued after the
        last trained batch if the script registers it (register_state(loader=loader)); "eval", "predict": all samples in
        order, on every rank. data_sampler: yields the indices instead. batch_size: default: the micro-batch size.

        Raises ConfigError for a data set without a length or samples, and for an unknown route."""
        accumulation = self.state.accumulation
        return loader_of(
            dataset,
            route,
            collate_fn,
            self.config,
            self.comm,
            lambda: accumulation.micro_steps,
            batch_size,
            data_sampler,
            num_local_io_workers or 0,
            pin_memory,
        )

    def _backward_epilogue(self) -> None:
        """Does nothing, for compatibility: scripts call it after a loss.backward() that several engines share, and the
        end of that backward has ended each engine's part."""
