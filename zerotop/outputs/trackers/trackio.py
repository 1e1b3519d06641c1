"""trackio, Hugging Face's local tracker: `trackio show` opens it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from runtime.config.outputs import WriterConfig
from zerotop.outputs.points import Point
from zerotop.outputs.trackers.base import About


class Trackio:
    """The same run there in all attempts: a run's name is its identity there."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._run: Any = None

    def load(self) -> None:
        importlib.import_module("trackio")

    def open(self, about: About) -> str:
        import trackio

        project = self._config.project or "zerotop"
        self._run = trackio.init(
            project=project,
            name=about.name,
            config=about.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"trackio show --project {project}"

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(point.values, step=point.step)

    def close(self, good: bool) -> None:
        self._run.finish()
