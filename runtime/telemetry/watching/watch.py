"""`watch`: the one line that shows a training script of any kind on the screen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from runtime.telemetry.watching import deepspeed
from runtime.telemetry.watching.control import CheckpointFailed, Controls
from runtime.telemetry.watching.hooks import attach_model, attach_optimizer
from runtime.telemetry.watching.introduction import Trainer
from runtime.telemetry.watching.joining import WatchError, start_watching
from runtime.telemetry.watching.watcher import Watcher

_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}
HOW_TO_SAVE = "give watch() a function that saves: watch(model, optimizer, save=lambda: ...)"
HOW_TO_STOP = "let the loop end when watcher.should_stop is true"


def watch(
    model: Any = None,
    optimizer: Any = None,
    *,
    save: Callable[[], Any] | None = None,
    stop: Callable[[], None] | None = None,
    accumulation: int = 1,
    steps: int | None = None,
    start_step: int = 0,
) -> Watcher:
    """Show this process in the run that `zerotop run` has started, and obey its commands at step boundaries.

    model: a torch module as it is called in the loop (also in DistributedDataParallel or under FSDP2), or a DeepSpeed
    engine, which needs no optimizer. optimizer: a torch optimizer or several; each step of the last one is a step of
    the run. save: saves a checkpoint, on all ranks; it may return the path. stop: asks the loop to end; without it
    `Watcher.should_stop` says so. accumulation: micro-steps in a step. steps: how many there will be. start_step: steps
    before this process, of a resumed training.

    Outside a run it returns a Watcher that does nothing. A second call in a process is an error, unless the first
    Watcher was closed. Raises WatchError.
    """
    if model is not None and optimizer is None and not deepspeed.is_engine(model):
        raise WatchError(
            "watch(model, optimizer): a torch module needs its optimizer, whose steps are the steps of the run. "
            "Only a DeepSpeed engine is watched alone: watch(engine)"
        )
    if model is not None and not deepspeed.is_engine(model) and not hasattr(model, "register_forward_pre_hook"):
        raise WatchError(f"watch(model, optimizer): expected a torch module, got {type(model).__name__}")
    if model is not None and deepspeed.is_engine(model):
        return deepspeed.watch_engine(model, save)
    optimizers = [inner_optimizer(one) for one in _listed(optimizer)]
    for one in optimizers:
        if not hasattr(one, "register_step_post_hook"):
            raise WatchError(f"watch(model, optimizer): expected a torch optimizer, got {type(one).__name__}")
    modules = [] if model is None else [model]
    trainer = Trainer(
        name=_trainer_name(model),
        modules=modules,
        optimizers=optimizers,
        stage=3 if _is_fsdp(model) else 0,
        precision=precision_of(model),
        accumulation=accumulation,
        steps=steps,
        start_step=start_step,
        controls=controls_of(save, stop, optimizers),
    )
    watcher = start_watching(trainer)
    if not watcher.active:
        return watcher
    if any(getattr(one, "state", None) for one in optimizers) and not start_step:
        warnings.warn(
            "watch() was called after training began: its first step counts as step 1. start_step= says how many there "
            "were before",
            stacklevel=2,
        )
    for module in modules:
        watcher.on_close(attach_model(module, watcher))
    for one in optimizers[-1:]:
        watcher.on_close(attach_optimizer(one, watcher))
    return watcher


def controls_of(save: Callable[[], Any] | None, stop: Callable[[], None] | None, optimizers: Sequence[Any]) -> Controls:
    """The controls of a loop of torch's own parts."""

    def saving() -> str:
        assert save is not None
        try:
            path = save()
        except Exception as error:  # the training goes on without this checkpoint
            raise CheckpointFailed(f"save() raised {type(error).__name__}: {error}") from error
        return str(path) if path is not None else "where the script saves"

    return Controls(
        save=None if save is None else saving,
        stop=stop,
        optimizers=optimizers,
        reasons={"checkpoint": HOW_TO_SAVE, "stop": HOW_TO_STOP},
    )


def _listed(optimizer: Any) -> list[Any]:
    return [] if optimizer is None else list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a wrapper (accelerate's, Lightning's), whose step only calls that one's."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "register_step_post_hook") else optimizer


def _is_fsdp(model: Any) -> bool:
    """Whether torch's fully_shard has been applied."""
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def _trainer_name(model: Any) -> str:
    version = getattr(sys.modules.get("torch"), "__version__", "").split("+")[0]
    kind = "FSDP2" if _is_fsdp(model) else "DDP" if type(model).__name__ == "DistributedDataParallel" else ""
    return f"torch {version} {kind}".strip()


def precision_of(model: Any) -> str:
    """The dtype of a model's first parameter, as configs write it."""
    dtype = next((p.dtype for p in model.parameters()), None) if model is not None else None
    return _DTYPES.get(str(dtype), str(dtype or "").removeprefix("torch."))
