"""The tracker of each type of zerotop.writers."""

from __future__ import annotations

from collections.abc import Callable

from runtime.config.outputs import WriterConfig
from zerotop.outputs.trackers.base import Tracker
from zerotop.outputs.trackers.mlflow import MLflow
from zerotop.outputs.trackers.tensorboard import TensorBoard
from zerotop.outputs.trackers.trackio import Trackio
from zerotop.outputs.trackers.wandb import WandB

TRACKERS: dict[str, Callable[[WriterConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Each imports its package when it is opened."""
