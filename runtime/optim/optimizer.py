"""The optimizer as scripts and schedulers see it, over the user's parameters: its parameter groups give the optimizers
of all shards their numbers."""

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
from runtime.optim.foreign import check_elementwise, like, torchs_kind
from runtime.optim.shard_optimizer import OffloadedStates, ShardAdamW, ShardOptimizer, ShardTorchOptimizer
from runtime.zero.flat import FlatParamGroup

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD")
"""Optimizers of torch.optim that treat every element by itself, and so work on flat ranges as they are."""

_LATE_GROUPS = (
    "the optimizer's parameter groups changed after initialize(): the engine trains the groups it was made with. Give "
    "all groups to initialize(); parameters that train later can be in it with lr 0 until then"
)


class OptimizerOwner(Protocol):
    """The engine, as far as scripts ask for it through its optimizer."""

    @property
    def loss_scale(self) -> float: ...
    def dynamic_loss_scale(self) -> bool: ...
    def get_global_grad_norm(self) -> float | None: ...
    def masters(self) -> list[torch.Tensor]: ...
    def offload_states(self, *given: Any, **named: Any) -> None: ...
    def reload_states(self, non_blocking: bool = False) -> None: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def optimizer_state_dict(self) -> dict[str, Any]: ...
    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ZeroOptimizer(torch.optim.Optimizer):
    """`param_groups` hold the user's own parameters and numbers (lr, weight_decay, ...); change them as with any
    optimizer.

    The update itself runs inside engine.step(), on each rank's ranges.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        kind: str,
        decoupled: bool,
        bias_correction: bool = True,
        given: torch.optim.Optimizer | None = None,
    ) -> None:
        self.kind, self.decoupled, self.bias_correction = kind, decoupled, bias_correction
        self.given = given
        """The script's own optimizer, whose groups these are: a scheduler bound to either changes both."""
        numbers = {key: value for key, value in groups[0].items() if key != "params"}
        super().__init__(groups, numbers)  # the defaults: some schedulers look there for betas or momentum
        if given is not None:
            self.param_groups = given.param_groups
        self.initial_groups = [plain_numbers(group) for group in self.param_groups]
        """As the script or the config made them, before a scheduler changes them."""
        self._sealed: list[int] | None = None
        self._engine: weakref.ref[OptimizerOwner] | None = None

    @property
    def trains(self) -> bool:
        """False for the optimizer of an engine that was made without one."""
        return True

    def bind(self, engine: OptimizerOwner) -> None:
        """An engine has taken the groups over: from now on their parameters stay what they are."""
        self._sealed = self._sizes()
        self._engine = weakref.ref(engine)

    # ---- what scripts ask it of its engine ---------------------------------------------------------------------------
    def _asked(self) -> OptimizerOwner:
        engine = self._engine() if self._engine is not None else None
        if engine is None:
            raise AttributeError("this optimizer belongs to no engine, or its engine is gone")
        return engine

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The script's own, which DeepSpeed's optimizer wraps; without one, this."""
        return self if self.given is None else self.given

    @property
    def loss_scale(self) -> float:
        return self._asked().loss_scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self._asked().dynamic_loss_scale()

    @property
    def overflow(self) -> bool:
        """Whether the last optimizer step was skipped, because a gradient was not finite."""
        norm = self._asked().get_global_grad_norm()
        return norm is not None and not math.isfinite(norm)

    def get_global_norm(self) -> float | None:
        """See Engine.get_global_grad_norm."""
        return self._asked().get_global_grad_norm()

    @property
    def _global_grad_norm(self) -> float | None:
        return self.get_global_norm()

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """This rank's masters, (state shard,) fp32 of every flat buffer in forward order; not copies."""
        return self._asked().masters()

    def offload_states(self, *given: Any, **named: Any) -> None:
        """See Engine.offload_states."""
        self._asked().offload_states(*given, **named)

    def reload_states(self, non_blocking: bool = False) -> None:
        """See Engine.reload_states."""
        self._asked().reload_states(non_blocking)

    def described(self) -> dict[str, str]:
        """What must be equal on all ranks, by name."""
        found = {"its type": self.kind}
        for index, numbers in enumerate(self.numbers(1.0)):
            for key, value in sorted(numbers.items()):
                found[f"{key} of group {index}"] = str(value.tolist() if isinstance(value, torch.Tensor) else value)
        return found

    def _sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.param_groups]

    def check_groups(self) -> None:
        """Raises RuntimeError when groups or their parameters came or went past `add_param_group` here."""
        if self._sealed is not None and self._sealed != self._sizes():
            raise RuntimeError(_LATE_GROUPS)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's own, without the decorator that imports the compiler (100 MB). Not after initialize()."""
        if getattr(self, "_sealed", None) is not None:
            raise RuntimeError(_LATE_GROUPS)
        plain = torch.optim.Optimizer.add_param_group
        getattr(plain, "__wrapped__", plain)(self, param_group)

    def make_shard_optimizer(
        self, flat: FlatParamGroup, ledger: Ledger, host: OffloadedStates | None = None
    ) -> ShardOptimizer:
        """host: for a flat whose states are in other memory than its parameters."""
        if self.kind in ("Adam", "AdamW"):
            return ShardAdamW(flat, self.decoupled, self.bias_correction, host)
        kind: Callable[..., torch.optim.Optimizer]
        if self.given is not None and torchs_kind(self.given) is None:
            kind = partial(like, self.given)
        else:
            kind = partial(getattr(torch.optim, self.kind), **self._constructor())
        return ShardTorchOptimizer(flat, kind, self.numbers(1.0), ledger, host)

    def _constructor(self) -> dict[str, Any]:
        """Arguments that torch reads when it makes the optimizer, and not in a group."""
        defaults = self.defaults if self.given is None else self.given.defaults
        return {key: defaults[key] for key in ("initial_accumulator_value",) if key in defaults}

    def numbers(self, lr_factor: float) -> list[dict[str, Any]]:
        """Each group's numbers without its parameters, lr multiplied by the run's learning-rate factor."""
        return [
            {**{k: v for k, v in g.items() if k != "params"}, "lr": float(g["lr"]) * lr_factor}
            for g in self.param_groups
        ]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        raise RuntimeError(
            "optimizer.step(): call engine.step() instead; it reduces, clips, updates and gathers on all ranks"
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of masters and states, and the parameter groups; for the same rank, world size and stage.
        engine.save_checkpoint(folder) is what others can read."""
        if self._engine is None:
            raise RuntimeError("optimizer.state_dict(): there is no engine yet, and so no states; call it afterwards")
        if (engine := self._engine()) is None:
            raise RuntimeError("optimizer.state_dict(): the engine that held the states is gone")
        return engine.optimizer_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict() of this rank gave. Every rank must call it. Raises ValueError for anything else."""
        if self._engine is None:
            raise RuntimeError("optimizer.load_state_dict(): there is no engine yet to take states; call it afterwards")
        if (engine := self._engine()) is None:
            raise RuntimeError("optimizer.load_state_dict(): the engine that held the states is gone")
        engine.load_optimizer_state_dict(state_dict)

    def mark_stepped(self) -> None:
        """torch's schedulers warn when they are advanced before the optimizer they watch has stepped."""
        for optimizer in (self, self.given):
            if optimizer is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As engine.zero_grad()."""
        if self._engine is not None and (engine := self._engine()) is not None:
            engine.zero_grad()


class NoOptimizer(ZeroOptimizer):
    """What an engine that only evaluates has in the place of one: no groups, no states."""

    def __init__(self) -> None:  # torch's refuses an empty list of parameters
        self.kind, self.decoupled, self.bias_correction, self.given = "none", False, True, None
        self.param_groups, self.defaults, self.initial_groups = [], {}, []
        self.state = defaultdict(dict)
        self._sealed, self._engine = None, None

    @property
    def trains(self) -> bool:
        return False


def optimizer_from_config(
    parameters: list[dict[str, Any]] | Iterable[nn.Parameter], config: OptimizerConfig
) -> ZeroOptimizer:
    """`parameters`: what the script gave as model_parameters (parameters, or groups with numbers of their own)."""
    listed: list[Any] = list(parameters)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    numbers = config.torch_kwargs()
    full = [
        {
            **_defaults(config.type),
            **numbers,
            **{k: v for k, v in group.items() if k != "params"},
            "params": list(group["params"]),
        }
        for group in groups
    ]
    return ZeroOptimizer(full, config.type, decoupled=config.type == "AdamW", bias_correction=config.bias_correction)


def optimizer_from_torch(optimizer: torch.optim.Optimizer) -> ZeroOptimizer:
    """The numbers and groups of a torch optimizer that a script made; its (still empty) states are left behind.

    Raises ConfigError for an optimizer that is not elementwise, or that has already stepped.
    """
    kind = torchs_kind(optimizer)
    if kind is not None and kind not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer: expected an elementwise optimizer of torch.optim ({', '.join(ELEMENTWISE)}) or of another "
            f"library, got {type(optimizer).__module__}.{kind}: a rank holds only flat shards, not whole matrices"
        )
    if any(_has_stepped(state) for state in optimizer.state.values()):
        raise ConfigError(
            [
                f"optimizer: this {type(optimizer).__name__} has stepped already; give it to initialize() fresh, and "
                "load states with load_checkpoint()"
            ]
        )
    groups = optimizer.param_groups
    if kind is None:
        check_elementwise(optimizer)
        return ZeroOptimizer(groups, type(optimizer).__name__, decoupled=False, given=optimizer)
    if kind == "AdamW" and not groups[0].get("decoupled_weight_decay", True):  # FusedAdam(adam_w_mode=False)
        kind = "Adam"
    if any(group.get("amsgrad") for group in groups) and kind in ("Adam", "AdamW"):
        raise ConfigError(["optimizer: amsgrad=True is not supported; use amsgrad=False"])
    if any(group.get("maximize") for group in groups) and kind in ("Adam", "AdamW"):
        raise ConfigError(["optimizer: maximize=True is not supported with Adam and AdamW; negate the loss"])
    decoupled = kind == "AdamW" or bool(groups[0].get("decoupled_weight_decay"))
    bias_correction = bool(groups[0].get("bias_correction", True))  # only ours say (ops/adam.py)
    return ZeroOptimizer(groups, kind, decoupled, bias_correction, given=optimizer)


def plain_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a parameter group: all but its parameters, and a script's own objects."""
    return {key: _copied(value) for key, value in group.items() if key != "params" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _copied(value: Any) -> Any:
    return value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value


def _has_stepped(state: dict[str, Any]) -> bool:
    """Some optimizers (Adagrad) make their states before the first step, which then say step 0."""
    return float(state["step"]) > 0 if "step" in state else any(value is not None for value in state.values())


def _defaults(kind: str) -> dict[str, Any]:
    if kind in ("Adam", "AdamW"):
        return {}
    return dict(getattr(torch.optim, kind)([nn.Parameter(torch.zeros(1))]).defaults)
