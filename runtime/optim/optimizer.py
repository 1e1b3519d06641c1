"""The optimizer as scripts and schedulers see it: its parameter groups have the user's parameters and hyperparameters,
which the optimizers of all shards use."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from runtime.config import ConfigError, OptimizerConfig
from runtime.host.ledger import Ledger
from runtime.optim.foreign import check_elementwise, fresh_copy, torch_optimizer_name
from runtime.optim.shard_optimizer import OffloadedStates, ShardAdamW, ShardOptimizer, ShardTorchOptimizer
from runtime.zero.flat import FlatParamGroup

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD")
"""Optimizers of torch.optim that treat every element by itself, and so can update flat shards."""

_LATE_GROUPS = (
    "the optimizer's parameter groups changed after initialize(), but the engine trains the groups it was made with. "
    "Give all groups to initialize(); parameters that are trained later can have lr 0 until then"
)


class OptimizerOwner(Protocol):
    """The engine's methods that scripts call through its optimizer: see Engine."""

    @property
    def loss_scale(self) -> float:
        """The current loss scale."""

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts to overflows."""

    def get_global_grad_norm(self) -> float | None:
        """Gradient norm of the last step, before clipping."""

    def masters(self) -> list[torch.Tensor]:
        """(state shard,) fp32 masters of every group."""

    def offload_states(self, *given: Any, **named: Any) -> None:
        """Move states to host memory."""

    def reload_states(self, non_blocking: bool = False) -> None:
        """Move offloaded states back to the device."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients."""

    def optimizer_state_dict(self) -> dict[str, Any]:
        """This rank's masters and optimizer states."""

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what optimizer_state_dict() returned."""


class ZeroOptimizer(torch.optim.Optimizer):
    """The engine's optimizer. Its `param_groups` have the user's parameters and hyperparameters (lr, weight_decay,
    ...), which can be changed as with any optimizer. The update itself runs in engine.step(), on each rank's shards.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        kind: str,
        decoupled: bool,
        bias_correction: bool = True,
        wrapped: torch.optim.Optimizer | None = None,
    ) -> None:
        self.kind, self.decoupled, self.bias_correction = kind, decoupled, bias_correction
        self.wrapped = wrapped
        """The script's own optimizer. It shares its groups with this one, so a scheduler may be bound to either."""
        defaults = {key: value for key, value in groups[0].items() if key != "params"}
        super().__init__(groups, defaults)  # some schedulers look in the defaults for betas or momentum
        if wrapped is not None:
            self.param_groups = wrapped.param_groups
        self.initial_groups = [plain_hyperparameters(group) for group in self.param_groups]
        """Hyperparameters of each group as the script or the config made them, before a scheduler changes them."""
        self._group_sizes: list[int] | None = None
        self._engine: weakref.ref[OptimizerOwner] | None = None

    @property
    def trains(self) -> bool:
        """Whether it updates parameters: False for NoOptimizer."""
        return True

    def bind(self, engine: OptimizerOwner) -> None:
        """Attach to the engine that trains these groups, whose parameters must not change from now on."""
        self._group_sizes = self._current_sizes()
        self._engine = weakref.ref(engine)

    # ---- attributes that scripts read, answered by the engine --------------------------------------------------------
    def _require_engine(self) -> OptimizerOwner:
        engine = self._engine() if self._engine is not None else None
        if engine is None:
            raise AttributeError("this optimizer belongs to no engine, or its engine was deleted")
        return engine

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The script's own optimizer, which DeepSpeed's wraps; without one, this."""
        return self if self.wrapped is None else self.wrapped

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1 unless the precision is fp16."""
        return self._require_engine().loss_scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts to overflows."""
        return self._require_engine().dynamic_loss_scale()

    def needs_scaler(self) -> bool:
        """Whether a loss must be scaled before its backward: True with fp16."""
        return self.dynamic_loss_scale or self.loss_scale != 1

    @property
    def overflow(self) -> bool:
        """Whether the last optimizer step was skipped, because a gradient was not finite."""
        norm = self._require_engine().get_global_grad_norm()
        return norm is not None and not math.isfinite(norm)

    def get_global_norm(self) -> float | None:
        """See Engine.get_global_grad_norm."""
        return self._require_engine().get_global_grad_norm()

    @property
    def _global_grad_norm(self) -> float | None:
        return self.get_global_norm()

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """This rank's masters, not copies: (state shard,) fp32 of every flat parameter group in forward order."""
        return self._require_engine().masters()

    def offload_states(self, *given: Any, **named: Any) -> None:
        """See Engine.offload_states."""
        self._require_engine().offload_states(*given, **named)

    def reload_states(self, non_blocking: bool = False) -> None:
        """See Engine.reload_states."""
        self._require_engine().reload_states(non_blocking)

    def settings(self) -> dict[str, str]:
        """Name -> value of the settings that must be equal on all ranks."""
        found = {"its type": self.kind}
        for index, numbers in enumerate(self.hyperparameters(1.0)):
            for key, value in sorted(numbers.items()):
                found[f"{key} of group {index}"] = str(value.tolist() if isinstance(value, torch.Tensor) else value)
        return found

    def _current_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.param_groups]

    def check_groups(self) -> None:
        """Raises RuntimeError if groups or parameters were added or removed without `add_param_group`."""
        if self._group_sizes is not None and self._group_sizes != self._current_sizes():
            raise RuntimeError(_LATE_GROUPS)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before initialize(). Avoids torch's decorator, which imports the compiler (100 MB)."""
        if getattr(self, "_group_sizes", None) is not None:
            raise RuntimeError(_LATE_GROUPS)
        plain = torch.optim.Optimizer.add_param_group
        getattr(plain, "__wrapped__", plain)(self, param_group)

    def make_shard_optimizer(
        self,
        flat: FlatParamGroup,
        ledger: Ledger,
        host: OffloadedStates | None = None,
        moments: torch.dtype = torch.float32,
    ) -> ShardOptimizer:
        """Make the optimizer of this rank's shard of `flat`. host: for a group whose states are in other memory than
        its parameters. moments: dtype of Adam's states."""
        if self.kind in ("Adam", "AdamW"):
            return ShardAdamW(flat, self.decoupled, self.bias_correction, host, moments)
        kind: Callable[..., torch.optim.Optimizer]
        if self.wrapped is not None and torch_optimizer_name(self.wrapped) is None:
            kind = partial(fresh_copy, self.wrapped)
        else:
            kind = partial(getattr(torch.optim, self.kind), **self._constructor())
        return ShardTorchOptimizer(flat, kind, self.hyperparameters(1.0), ledger, host)

    def _constructor(self) -> dict[str, Any]:
        """Arguments of the constructor that torch does not keep in parameter groups."""
        defaults = self.defaults if self.wrapped is None else self.wrapped.defaults
        return {key: defaults[key] for key in ("initial_accumulator_value",) if key in defaults}

    def hyperparameters(self, lr_factor: float) -> list[dict[str, Any]]:
        """Hyperparameters of each group, with lr multiplied by the run's learning-rate factor."""
        return [
            {**{k: v for k, v in g.items() if k != "params"}, "lr": float(g["lr"]) * lr_factor}
            for g in self.param_groups
        ]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Raises RuntimeError: call engine.step()."""
        raise RuntimeError(
            "optimizer.step(): call engine.step() instead; it reduces, clips, updates and all-gathers on all ranks"
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's masters and optimizer states, and the parameter groups. Only the same rank with the same world
        size and stage can load them; engine.save_checkpoint(folder) has no such limit."""
        if self._engine is None:
            raise RuntimeError("optimizer.state_dict(): there are no states before initialize(); call it afterwards")
        if (engine := self._engine()) is None:
            raise RuntimeError("optimizer.state_dict(): the engine that had the states was deleted")
        return engine.optimizer_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() of this rank returned. Every rank must call it. Raises ValueError for anything
        else."""
        if self._engine is None:
            raise RuntimeError("optimizer.load_state_dict(): no states exist before initialize(); call it afterwards")
        if (engine := self._engine()) is None:
            raise RuntimeError("optimizer.load_state_dict(): the engine that had the states was deleted")
        engine.load_optimizer_state_dict(state_dict)

    def mark_stepped(self) -> None:
        """Tell torch's schedulers that a step was taken: they warn if they are advanced before the first one."""
        for optimizer in (self, self.wrapped):
            if optimizer is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call engine.zero_grad()."""
        if self._engine is not None and (engine := self._engine()) is not None:
            engine.zero_grad()


class NoOptimizer(ZeroOptimizer):
    """The optimizer of an engine that only evaluates: it has no groups and no states."""

    def __init__(self) -> None:  # torch's constructor refuses an empty list of parameters
        self.kind, self.decoupled, self.bias_correction, self.wrapped = "none", False, True, None
        self.param_groups, self.defaults, self.initial_groups = [], {}, []
        self.state = defaultdict(dict)
        self._group_sizes, self._engine = None, None

    @property
    def trains(self) -> bool:
        """Always False."""
        return False


def optimizer_from_config(
    parameters: list[dict[str, Any]] | Iterable[nn.Parameter], config: OptimizerConfig
) -> ZeroOptimizer:
    """Make the optimizer of the config's `optimizer` section. parameters: the script's model_parameters (parameters, or
    groups with hyperparameters of their own)."""
    listed: list[Any] = list(parameters)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    full = [
        {
            **_defaults(config.type),
            **config.torch_kwargs(),
            **{k: v for k, v in group.items() if k != "params"},
            "params": list(group["params"]),
        }
        for group in groups
    ]
    return ZeroOptimizer(full, config.type, decoupled=config.type == "AdamW", bias_correction=config.bias_correction)


def optimizer_from_torch(optimizer: torch.optim.Optimizer) -> ZeroOptimizer:
    """Make the engine's optimizer from the groups of a torch optimizer that a script made, whose states are still
    empty.

    Raises ConfigError if the optimizer is not elementwise or has already stepped.
    """
    kind = torch_optimizer_name(optimizer)
    if kind is not None and kind not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer: expected an elementwise optimizer of torch.optim ({', '.join(ELEMENTWISE)}) or of another "
            f"library, got {type(optimizer).__module__}.{kind}: a rank has only flat shards, not full matrices"
        )
    if any(_has_stepped(state) for state in optimizer.state.values()):
        raise ConfigError(
            [
                f"optimizer: this {type(optimizer).__name__} has stepped already; give initialize() a new one, and "
                "load states with load_checkpoint()"
            ]
        )
    groups = optimizer.param_groups
    if kind is None:
        check_elementwise(optimizer)
        return ZeroOptimizer(groups, type(optimizer).__name__, decoupled=False, wrapped=optimizer)
    if kind == "AdamW" and not groups[0].get("decoupled_weight_decay", True):  # FusedAdam(adam_w_mode=False)
        kind = "Adam"
    if any(group.get("amsgrad") for group in groups) and kind in ("Adam", "AdamW"):
        raise ConfigError(["optimizer: amsgrad=True is not supported; use amsgrad=False"])
    if any(group.get("maximize") for group in groups) and kind in ("Adam", "AdamW"):
        raise ConfigError(["optimizer: maximize=True is not supported with Adam and AdamW; negate the loss"])
    decoupled = kind == "AdamW" or bool(groups[0].get("decoupled_weight_decay"))
    bias_correction = bool(groups[0].get("bias_correction", True))  # only optimizers of ops/adam.py have it
    return ZeroOptimizer(groups, kind, decoupled, bias_correction, wrapped=optimizer)


def plain_hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of `group` that a checkpoint keeps: numbers, texts and tensors, not a script's own
    objects."""
    return {key: _copied(value) for key, value in group.items() if key != "params" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _copied(value: Any) -> Any:
    return value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value


def _has_stepped(state: dict[str, Any]) -> bool:
    """Whether a step was taken. Some optimizers (Adagrad) have states with step 0 before the first one."""
    return float(state["step"]) > 0 if "step" in state else any(value is not None for value in state.values())


def _defaults(kind: str) -> dict[str, Any]:
    if kind in ("Adam", "AdamW"):
        return {}
    return dict(getattr(torch.optim, kind)([nn.Parameter(torch.zeros(1, device="cpu"))]).defaults)
