"""A DeepSpeed engine: it accumulates and steps by itself, and its ZeRO optimizers are none of torch's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from runtime.telemetry.watching.control import CheckpointFailed, Controls
from runtime.telemetry.watching.guard import attribute, never_raises
from runtime.telemetry.watching.hooks import PhaseListener, attach_model
from runtime.telemetry.watching.introduction import Trainer
from runtime.telemetry.watching.joining import start_watching
from runtime.telemetry.watching.watcher import Watcher
from runtime.wire.rundir import RUN_VARIABLE

_STOP = "let the loop end when watcher.should_stop is true"


def is_engine(model: Any) -> bool:
    """Whether `model` is an engine of DeepSpeed's."""
    return hasattr(model, "zero_optimization_stage") and hasattr(model, "gradient_accumulation_steps")


def watch_engine(engine: Any, save: Callable[[], Any] | None) -> Watcher:
    """As `watch`. Without `save`, `zerotop checkpoint` calls the engine's save_checkpoint() on a folder of the run."""
    optimizer = getattr(engine, "optimizer", None)
    candidates: list[Any] = [getattr(optimizer, "optimizer", None), optimizer]
    inner = [one for one in candidates if _has_hooks(one)][:1]
    trainer = Trainer(
        name=f"DeepSpeed {getattr(sys.modules.get('deepspeed'), '__version__', '')}".strip(),
        packages=("torch", "deepspeed"),
        modules=[engine.module],
        optimizers=[optimizer] if optimizer is not None else [],
        stage=int(attribute(engine, "zero_optimization_stage", 0) or 0),
        precision=_precision(engine),
        micro_batch=int(attribute(engine, "train_micro_batch_size_per_gpu", 0) or 0),
        accumulation=int(attribute(engine, "gradient_accumulation_steps", 1) or 1),
        start_step=int(attribute(engine, "global_steps", 0) or 0),
        controls=Controls(save=_saver(engine, save), optimizers=inner, reasons={"stop": _STOP}),
    )
    watcher = start_watching(trainer)
    if not watcher.active:
        return watcher
    listener = _EngineListener(watcher, engine)
    watcher.on_close(attach_model(engine, cast(PhaseListener, listener)))
    watcher.on_close(listener.catch_up)
    watcher.catch_up = never_raises(listener.catch_up)
    for one in inner:
        handles = (
            one.register_step_pre_hook(never_raises(lambda *_given: watcher.step_begins())),
            one.register_step_post_hook(never_raises(lambda *_given: watcher.link.enter("data"))),
        )
        for handle in handles:
            watcher.on_close(handle.remove)
    return watcher


class _EngineListener:
    """The phases of an engine. It tells nobody when a step has ended, but counts them: the next forward finds out, or
    before it a loop that asks whether it should stop."""

    def __init__(self, watcher: Watcher, engine: Any) -> None:
        self._watcher, self._engine = watcher, engine
        for name in (
            "forward_ended",
            "backward_begins",
            "backward_ended",
            "evaluation_begins",
            "evaluation_ended",
            "step_begins",
            "step_ended",
        ):
            setattr(self, name, getattr(watcher, name))

    def forward_begins(self, samples: int | None, tokens: int | None) -> None:
        """The next micro-step, perhaps after a step."""
        self.catch_up()
        self._watcher.forward_begins(samples, tokens)

    def gradients_computed(self) -> None:
        """It waits for its communication within backward."""

    def catch_up(self) -> None:
        """Tell of the step that the engine has taken since."""
        if attribute(self._engine, "global_steps", 0) > self._watcher.step:
            norm = attribute(self._engine, "get_global_grad_norm", None)
            if norm is not None:
                self._watcher.log(grad_norm=norm)
            self._watcher.step_ended()


def _has_hooks(optimizer: Any) -> bool:
    return hasattr(optimizer, "register_step_post_hook") and hasattr(optimizer, "param_groups")


def _saver(engine: Any, save: Callable[[], Any] | None) -> Callable[[], str]:
    folder = Path(os.environ.get(RUN_VARIABLE, "."), "checkpoints")

    def saving() -> str:
        try:
            if save is not None:
                return str(save() or "where the script saves")
            engine.save_checkpoint(str(folder))
        except Exception as error:  # the training goes on without this checkpoint
            raise CheckpointFailed(f"saving raised {type(error).__name__}: {error}") from error
        return str(folder / f"global_step{engine.global_steps}")

    return saving


def _precision(engine: Any) -> str:
    if attribute(engine, "fp16_enabled", False):
        return "fp16"
    return "bf16" if attribute(engine, "bfloat16_enabled", False) else "fp32"
