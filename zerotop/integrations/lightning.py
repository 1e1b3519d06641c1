"""PyTorch Lightning.

Trainer(..., callbacks=[ZerotopCallback()])
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

try:
    import lightning.pytorch as lightning
except ModuleNotFoundError:
    import pytorch_lightning as lightning

from runtime.telemetry import Controls, Watcher
from runtime.telemetry.watching import Trainer, inner_optimizer, start_watching
from runtime.telemetry.watching.guard import never_raises
from runtime.telemetry.watching.hooks import batch_size

_PRECISIONS = {"32": "fp32", "32-true": "fp32", "64": "fp64", "64-true": "fp64", "bf16": "bf16", "16": "fp16"}


class ZerotopCallback(lightning.Callback):  # type: ignore[misc]  # whichever of the two packages is there
    """Shows the phases, steps, losses, memory and evaluations of a Trainer; obeys pause, checkpoint
    (`trainer.save_checkpoint` into the folder of its checkpoints), stop (after such a save), `set lr_factor` and
    `set log_interval`."""

    def __init__(self) -> None:
        self.watcher: Watcher | None = None
        self._trainer: Any = None
        self._steps_seen = 0
        self._evaluation_began = 0.0

    # ---- the loop --------------------------------------------------------------------------------------------------
    @never_raises
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch; a later fit of this process begins anew."""
        self.watcher = None
        optimizers = [one for one in map(inner_optimizer, trainer.optimizers) if hasattr(one, "param_groups")]
        self._trainer, self._steps_seen = trainer, trainer.global_step
        steps = trainer.estimated_stepping_batches
        watched = Trainer(
            name=f"Lightning {lightning.__version__}",
            packages=("torch", lightning.__name__.split(".")[0]),
            modules=[pl_module],
            optimizers=optimizers,
            precision=next((p for k, p in _PRECISIONS.items() if str(trainer.precision).startswith(k)), ""),
            accumulation=trainer.accumulate_grad_batches,
            steps=int(steps) if steps not in (float("inf"), -1) else None,
            start_step=trainer.global_step,
            controls=Controls(
                save=self._save,
                stop=self._stop,
                optimizers=optimizers,
                log_interval=trainer.log_every_n_steps or None,
                set_log_interval=self._set_log_interval if trainer.log_every_n_steps else None,
            ),
        )
        self.watcher = start_watching(watched, replaces=True)

    @never_raises
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A micro-step begins."""
        if self.watcher is not None:
            self.watcher.forward_begins(*batch_size(batch))

    @never_raises
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Its loss is known; Lightning has divided it by the accumulation."""
        if self.watcher is not None:
            self.watcher.forward_ended(loss.detach() * trainer.accumulate_grad_batches)
            self.watcher.backward_begins()

    @never_raises
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Gradients are computed and reduced."""
        if self.watcher is not None:
            self.watcher.backward_ended()

    @never_raises
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The optimizer is about to step."""
        if self.watcher is not None:
            self.watcher.step_begins()

    @never_raises
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A micro-step, and perhaps a step, has ended."""
        if self.watcher is not None and trainer.global_step > self._steps_seen:
            self._steps_seen = trainer.global_step
            self.watcher.step_ended()

    @never_raises
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """An evaluation begins."""
        self._evaluation_began = time.monotonic()
        if self.watcher is not None and not trainer.sanity_checking:
            self.watcher.evaluation_begins()

    @never_raises
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """It has ended: its loss is the metric that has a name for one."""
        if self.watcher is None or trainer.sanity_checking:
            return
        names = ("val_loss", "val/loss", "validation_loss", "valid_loss", "eval_loss")
        found = next((trainer.callback_metrics[name] for name in names if name in trainer.callback_metrics), None)
        if found is not None:
            self.watcher.evaluated(float(found), seconds=time.monotonic() - self._evaluation_began)

    @never_raises
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training ends with an error, or with Ctrl-C."""
        if self.watcher is not None:
            how = "stopped" if isinstance(exception, KeyboardInterrupt) else "failed"
            self.watcher.close(how, f"{type(exception).__name__}: {exception}")

    @never_raises
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The end of the watch."""
        if self.watcher is not None:
            self.watcher.close()

    # ---- commands --------------------------------------------------------------------------------------------------
    def _save(self) -> str:
        trainer = self._trainer
        of_callback = getattr(trainer.checkpoint_callback, "dirpath", None)
        folder = Path(of_callback or Path(trainer.default_root_dir, "checkpoints"))
        path = str(folder / f"step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path)
        return path

    def _stop(self) -> None:
        self._trainer.should_stop = True

    def _set_log_interval(self, steps: int) -> None:
        self._trainer.log_every_n_steps = steps
