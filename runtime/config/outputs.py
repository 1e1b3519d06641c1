"""The parts of the `zerotop` section that say where a run's figures go: metrics, experiment trackers, alerts, and who
is told of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from .section import Flag, Int, Section, Text, number, wrong

DEFAULT_METRICS_PORT = 9464
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts on which only this machine can reach a port."""

WriterType = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Severity = Literal["warning", "error"]
NOTICES = ("failed", "finished", "stopped", "aborted", "restarted", "hang", "stalled", "nan", "verdict", "alert")
"""What zerotop.notify can name without a rule. stalled: no rank makes progress, or one sends nothing. hang: a stall
that has lasted long enough for the stacks to be taken. nan: loss or gradient norm is not finite. verdict: the verdict
is bad news. alert: any of zerotop.alerts."""
DEFAULT_NOTICES = ("failed", "finished", "hang", "nan", "verdict", "alert")

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?\s*")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class WriterPackage(NamedTuple):
    """What a type of writer needs: the module that it imports, the extra of pyproject.toml that brings it, and the keys
    that it has of its own."""

    module: str
    extra: str
    keys: tuple[str, ...]


WRITERS: dict[str, WriterPackage] = {
    "tensorboard": WriterPackage("tensorboard", "tensorboard", ("folder",)),
    "wandb": WriterPackage("wandb", "wandb", ("project",)),
    "mlflow": WriterPackage("mlflow", "mlflow", ("project", "uri")),
    "trackio": WriterPackage("trackio", "trackio", ("project",)),
}


def parse_duration(text: str) -> float | None:
    """Seconds of "30s", "10m", "1.5h", "2d" or "45" (seconds); None for anything else."""
    match = _DURATION.fullmatch(text.lower())
    return float(match[1]) * _SECONDS[match[2] or "s"] if match else None


def _duration(value: Any) -> float:
    seconds = parse_duration(value) if isinstance(value, str) else number(value)
    if seconds is None or seconds < 0:
        raise wrong('a time such as "30s", "10m" or "1h", or seconds', value)
    return seconds


def _items(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise wrong("a list", value)
    return tuple(value)


def _item(value: Any) -> Any:
    if not isinstance(value, dict | Section):
        raise wrong("an object", value)
    return value


def _alert(value: Any) -> Any:
    if isinstance(value, str):
        return {"rule": value}
    if not isinstance(value, dict | Section):
        raise wrong('a rule such as "loss > 10 for 30s", or an object with the key rule', value)
    return value


def _names(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) and item for item in items):
        raise wrong('a list of conditions, such as ["failed", "alert"]', value)
    return tuple(items)


def _command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong('a list of a program and its arguments, such as ["notify-send", "{title}"]', value)
    if not all(isinstance(item, str) and "\0" not in item for item in value) or not value[0].strip():
        raise wrong('a list of a program and its arguments, such as ["notify-send", "{title}"]', value)
    return tuple(value)


Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds; in the file also "30s", "10m", "1h"."""


class PrometheusConfig(Section):
    """An HTTP endpoint with the run's metrics, for Prometheus."""

    port: Annotated[Int, Field(ge=0, le=65535)] = DEFAULT_METRICS_PORT
    """Port of http://HOST:PORT/metrics. 0: a free one, which an event names."""

    host: Text = LOOPBACK[0]
    """Address to listen on. By default only this machine can reach it; the metrics have no password."""


class WriterConfig(Section):
    """One experiment tracker that gets the figures of every optimizer step."""

    type: WriterType
    """Which tracker. Each needs its own package (`pip install '.[tensorboard]'` and so on)."""

    project: Text | None = None
    """W&B's and trackio's project, MLflow's experiment. Unset: zerotop."""

    name: Text | None = None
    """Name of the run there. Unset: the name of the run."""

    folder: Text | None = None
    """TensorBoard's log directory, in which the run gets a folder of its name; relative to the folder of the config
    file. Unset: tensorboard."""

    uri: Text | None = None
    """MLflow's tracking server. Unset: the environment variable MLFLOW_TRACKING_URI, else the folder mlruns beside the
    config file."""

    interval: Annotated[Int, Field(ge=1)] = 1
    """Optimizer steps between two points."""


class AlertConfig(Section):
    """A rule that is checked once a second while the run lives. A string stands for an object with only a rule."""

    rule: Text
    """CONDITION [for TIME] [until CONDITION]. Conditions: `loss > 10`, `vram > 95%`, `loss is nan`, `no step for 60s`,
    `verdict is straggler`, `verdict changes` (docs/alerts.md)."""

    name: Text | None = None
    """Name in events, metrics and notifications. Unset: the rule."""

    severity: Severity = "warning"
    """Of its event."""


class NotifyConfig(Section):
    """Whom to tell, and of what. Give `webhook` or `command`."""

    webhook: Text | None = None
    """URL that gets a JSON document by POST, which Slack and Discord understand. "$NAME" takes it from the environment
    variable NAME, so that it need not stand in a file."""

    command: Annotated[tuple[str, ...], BeforeValidator(_command)] | None = None
    """Program and arguments, run without a shell. {title}, {text}, {run}, {what}, {state}, {severity} and {step} are
    replaced; the JSON document comes on stdin."""

    on: Annotated[tuple[str, ...], BeforeValidator(_names)] = DEFAULT_NOTICES
    """Conditions (failed, finished, stopped, aborted, restarted, hang, stalled, nan, verdict, alert), and names of
    alerts."""

    every: Duration = 600.0
    """Seconds, or "10m": the least time between two notifications about the same thing. The end of the run is always
    told."""

    resolved: Flag = True
    """Whether to tell, too, when a condition is over."""


Writers = Annotated[tuple[Annotated[WriterConfig, BeforeValidator(_item)], ...], BeforeValidator(_items)]
Alerts = Annotated[tuple[Annotated[AlertConfig, BeforeValidator(_alert)], ...], BeforeValidator(_items)]
Notifications = Annotated[tuple[Annotated[NotifyConfig, BeforeValidator(_item)], ...], BeforeValidator(_items)]
