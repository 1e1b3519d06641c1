"""A DeepSpeed engine: it accumulates and steps by itself, and its ZeRO optimizers are none of torch's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from runtime.telemetry.watching.control import CheckpointFailed, Controls
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
    candidates: list[Any] = [getattr(engine.optimizer, "optimizer", None), engine.optimizer]
    inner = [one for one in candidates if _has_hooks(one)][:1]
    trainer = Trainer(
        name=f"DeepSpeed {getattr(sys.modules.get('deepspeed'), '__version__', '')}".strip(),
        modules=[engine.module],
        optimizers=[engine.optimizer] if engine.optimizer is not None else [],
        stage=int(engine.zero_optimization_stage()),
        precision=_precision(engine),
        micro_batch=int(engine.train_micro_batch_size_per_gpu()),
        accumulation=int(engine.gradient_accumulation_steps()),
        start_step=int(engine.global_steps),
        controls=Controls(save=_saver(engine, save), optimizers=inner, reasons={"stop": _STOP}),
    )
    watcher = start_watching(trainer)
    if not watcher.active:
        return watcher
    listener = _EngineListener(watcher, engine)
    watcher.on_close(attach_model(engine, cast(PhaseListener, listener)))
    watcher.on_close(listener.catch_up)
    for optimizer in inner:
        handles = (
            optimizer.register_step_pre_hook(lambda *_given: watcher.step_begins()),
            optimizer.register_step_post_hook(lambda *_given: watcher.link.enter("data")),
        )
        for handle in handles:
            watcher.on_close(handle.remove)
    return watcher


class _EngineListener:
    """The phases of an engine. It tells nobody when a step has ended, but counts them: the next forward finds out."""

    def __init__(self, watcher: Watcher, engine: Any) -> None:
        self._watcher, self._engine = watcher, engine
        for name in (
            "forward_ended",
            "backward_begins",
            "gradients_computed",
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

    def catch_up(self) -> None:
        """Tell of the step that the engine has taken since."""
        if self._engine.global_steps > self._watcher.step:
            norm = self._engine.get_global_grad_norm()
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
    if engine.fp16_enabled():
        return "fp16"
    return "bf16" if engine.bfloat16_enabled() else "fp32"
