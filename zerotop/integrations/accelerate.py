"""Accelerate: a tracker, so that `accelerator.log` reaches the screen.

accelerator = Accelerator(log_with=ZerotopTracker())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.init_trackers("project")
watcher = watch(model, optimizer)
"""

from __future__ import annotations

from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from runtime.telemetry.watching import current_watcher
from runtime.telemetry.watching.guard import never_raises

_NAMES = {
    "loss": "loss",
    "train_loss": "loss",
    "train/loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "lr": "lr",
}
"""Name in `accelerator.log` -> name in `Watcher.log`."""
_EVALUATIONS = ("eval_loss", "eval/loss", "val_loss", "validation_loss")


class ZerotopTracker(GeneralTracker):  # type: ignore[misc]  # accelerate is not typed
    """Adds loss, norm and learning rate of `accelerator.log` to the step of this process's `watch`, and shows
    evaluations. Without a watch it does nothing."""

    name = "zerotop"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self) -> Any:
        """The watcher; None before `watch` was called."""
        return current_watcher()

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run directory has the configuration already."""

    @on_main_process  # type: ignore[untyped-decorator]
    @never_raises
    def log(self, values: dict[str, Any], step: int | None = None, **_given: Any) -> None:
        """Take over the figures that have a place on the screen."""
        watcher = current_watcher()
        if watcher is None:
            return
        watcher.warn_of_versions(("accelerate",))
        watcher.log(**{ours: values[theirs] for theirs, ours in _NAMES.items() if theirs in values})
        for name in _EVALUATIONS:
            if name in values:
                watcher.evaluated(float(values[name]))
                break
