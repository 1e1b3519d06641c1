"""Weights & Biases. The account comes from its own settings (`wandb login`, WANDB_API_KEY); WANDB_MODE=offline
works."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from runtime.config.outputs import WriterConfig
from zerotop.outputs.points import Point
from zerotop.outputs.trackers.base import About

STEP = "train/step"


class WandB:
    """The same run there in all attempts."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._run: Any = None

    def load(self) -> None:
        importlib.import_module("wandb")

    def open(self, about: About) -> str:
        import wandb

        self._run = wandb.init(
            project=self._config.project or "zerotop",
            name=about.name,
            id=about.identity,
            resume="allow",
            dir=str(about.folder),
            config=about.settings,
            settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_machine_info=True),
        )
        # Its own counter of steps refuses to go back, as evaluations and resumed runs do.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        return self._run.url or f"W&B, offline, in {self._run.dir}"

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, STEP: point.step})

    def close(self, good: bool) -> None:
        import wandb

        code = 0 if good else 1
        self._run.finish(exit_code=code)
        wandb.teardown(code)  # ends its own process, too
