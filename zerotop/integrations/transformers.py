"""transformers' Trainer, and the trainers that build upon it (TRL's).

Trainer(..., callbacks=[ZerotopCallback()])
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from runtime.telemetry import Controls, Watcher
from runtime.telemetry.watching import Trainer, inner_optimizer, precision_of, start_watching
from runtime.telemetry.watching.guard import never_raises
from runtime.telemetry.watching.hooks import attach_model, attach_optimizer


class ZerotopCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Shows the phases, steps, losses, memory and evaluations of a Trainer; obeys pause, checkpoint (the Trainer's own
    save), stop (after such a save), `set lr_factor` and, if it logs by steps, `set log_interval`.

    The loss of a step is the Trainer's own figure where it logs one (`logging_steps`), else none: what the Trainer
    would log for a single step is not known to a callback. A step in which the model returned NaN or infinity shows
    that, logged or not.
    """

    def __init__(self) -> None:
        self.watcher: Watcher | None = None
        self._control: TrainerControl | None = None
        self._save_began = 0.0
        self._evaluation_began = 0.0

    # ---- the loop --------------------------------------------------------------------------------------------------
    @never_raises
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin to watch. A training that is tried again in this process (`auto_find_batch_size`) begins anew."""
        self.watcher = None
        model, optimizer = given.get("model"), inner_optimizer(given.get("optimizer"))
        optimizers = [optimizer] if hasattr(optimizer, "register_step_post_hook") else []
        trainer = Trainer(
            name=f"transformers {transformers.__version__}",
            packages=("torch", "transformers", "accelerate", "trl"),  # of those, the loaded ones
            modules=[model] if model is not None else [],
            optimizers=optimizers,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else precision_of(model),
            micro_batch=getattr(state, "train_batch_size", None) or args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            steps=state.max_steps,
            start_step=state.global_step,
            controls=Controls(
                save=self._ask_to_save,
                stop=self._ask_to_stop,
                stop_saves=True,
                optimizers=optimizers,
                log_interval=int(state.logging_steps),
                set_log_interval=_log_interval_of(args, state),
            ),
            late_results=True,
        )
        watcher = self.watcher = start_watching(trainer, replaces=True)
        if not watcher.active:
            return
        if model is not None:
            watcher.on_close(attach_model(model, _Phases(watcher)))
        for one in optimizers:
            watcher.on_close(attach_optimizer(one, _Phases(watcher)))

    @never_raises
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any
    ) -> TrainerControl:
        """The boundary: commands apply here, by the flags that the Trainer looks at next."""
        if self.watcher is not None and self.watcher.active:
            self._control = control
            self.watcher.step_ended()
            self.watcher.boundary()
            self._control = None
        return control

    @never_raises
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_given: Any,
    ) -> None:
        """The figures of the last step."""
        if self.watcher is None or not logs:
            return
        names = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}
        self.watcher.log(**{ours: logs[theirs] for theirs, ours in names.items() if theirs in logs})

    @never_raises
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any
    ) -> None:
        """A batch of an evaluation."""
        self._evaluation_began = self._evaluation_began or time.monotonic()

    @never_raises
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_given: Any,
    ) -> None:
        """An evaluation has ended."""
        began, self._evaluation_began = self._evaluation_began, 0.0
        if self.watcher is not None and metrics and "eval_loss" in metrics:
            seconds = metrics.get("eval_runtime", time.monotonic() - began if began else 0.0)
            self.watcher.evaluated(float(metrics["eval_loss"]), seconds=float(seconds))

    @never_raises
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any) -> None:
        """The Trainer has written a checkpoint."""
        if self.watcher is not None:
            path = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").resolve()
            self.watcher.saved(path, seconds=time.monotonic() - self._save_began if self._save_began else 0.0)
            self._save_began = 0.0

    @never_raises
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any
    ) -> None:
        """The end of the watch; a later train() begins another one."""
        if self.watcher is not None:
            self.watcher.close()

    # ---- commands --------------------------------------------------------------------------------------------------
    def _ask_to_save(self) -> None:
        assert self._control is not None
        self._control.should_save = True
        self._save_began = time.monotonic()

    def _ask_to_stop(self) -> None:
        assert self._control is not None
        self._control.should_save = True
        self._control.should_training_stop = True
        self._save_began = time.monotonic()


def _log_interval_of(args: TrainingArguments, state: TrainerState) -> Callable[[int], None] | None:
    """What changes the Trainer's `logging_steps`; None if it does not log by steps."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return None

    def change(steps: int) -> None:
        args.logging_steps = state.logging_steps = steps  # the Trainer looks at the second one

    return change


class _Phases:
    """What the hooks tell, except the boundary, of which the callback itself is told. The losses of micro-steps only
    tell whether they are finite: the Trainer has its own rule for their sum."""

    def __init__(self, watcher: Watcher) -> None:
        self.forward_begins = watcher.forward_begins
        self.backward_begins = watcher.backward_begins
        self.gradients_computed = watcher.gradients_computed
        self.backward_ended = watcher.backward_ended
        self.evaluation_begins = watcher.evaluation_begins
        self.evaluation_ended = watcher.evaluation_ended
        self.step_begins = watcher.step_begins
        self.forward_ended = watcher.check_loss
        """The Trainer leaves a NaN out of the mean that it logs."""

    def step_ended(self) -> None:
        """Not used."""
