"""MLflow's tracking server, or a local store."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

from runtime.config.outputs import WriterConfig
from zerotop.outputs.points import Point
from zerotop.outputs.trackers.base import About

IDENTITY = "zerotop.identity"
"""The tag by which a later attempt finds the run."""
MOST_METRICS = 1000
"""Of one request (MLflow's limit)."""


class MLflow:
    """The same MLflow run in all attempts."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run_id = ""

    def load(self) -> None:
        importlib.import_module("mlflow.tracking")

    def open(self, about: About) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._config.uri)
        project = self._config.project or "zerotop"
        experiment = client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment is not None else client.create_experiment(project)
        known = client.search_runs([number], filter_string=f"tags.`{IDENTITY}` = '{about.identity}'", max_results=1)
        if known:
            self._run_id = known[0].info.run_id
            client.set_terminated(self._run_id, "RUNNING")
        else:
            self._run_id = client.create_run(number, run_name=about.name, tags={IDENTITY: about.identity}).info.run_id
            client.log_batch(self._run_id, params=[Param(name, str(value)) for name, value in about.settings.items()])
        return f"experiment {project}, run {about.name} at {client.tracking_uri}"

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(point.wall_s * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + MOST_METRICS])

    def close(self, good: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if good else "FAILED", end_time=round(time.time() * 1000))
