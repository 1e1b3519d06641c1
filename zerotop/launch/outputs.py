"""Checks of the settings of outputs that need this machine: rules, ports, packages, environment variables."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
from collections.abc import Iterator, Mapping

from runtime.config import Config, ZerotopConfig
from runtime.config.errors import Path, clipped
from runtime.config.output_checks import url_problem
from runtime.config.outputs import LOOPBACK, WRITERS, NotifyConfig, PrometheusConfig
from runtime.process.extras import install_extra
from zerotop.alerts.rules import RuleError, parse_rule


def check_outputs(
    config: Config, section: ZerotopConfig, *, on_gpu: bool, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Notes on the outputs of a run that is about to start. Raises ConfigError for those that can't work here."""
    notes: list[str] = []
    problems = [*_telemetry(section), *_rules(section, on_gpu, notes), *_packages(section)]
    if section.prometheus is not None:
        problems += _endpoint(section.prometheus, notes)
    for index, notify in enumerate(section.notify):
        problems += _receiver(
            notify, ("zerotop", "notify", str(index)), os.environ if environment is None else environment
        )
    config.refuse(problems)
    return notes


def _telemetry(section: ZerotopConfig) -> Iterator[tuple[Path, str]]:
    """Without it no step is ever seen: rules would be silent, or cry for nothing."""
    wanting = [f"zerotop.{key}" for key in ("alerts", "writers", "prometheus") if getattr(section, key)]
    if wanting and not section.telemetry.enabled:
        verb = "needs" if len(wanting) == 1 else "need"
        yield ("zerotop", "telemetry", "enabled"), f": {' and '.join(wanting)} {verb} telemetry; set it to true"


def _rules(section: ZerotopConfig, on_gpu: bool, notes: list[str]) -> Iterator[tuple[Path, str]]:
    for index, alert in enumerate(section.alerts):
        path: Path = ("zerotop", "alerts", str(index))
        try:
            rule = parse_rule(alert.rule)
        except RuleError as error:
            yield (*path, "rule"), f": {clipped(alert.rule)!r}: {error}"
            continue
        if rule.needs_gpu and not on_gpu:
            notes.append(f"zerotop.alerts: {alert.rule!r} never fires here, because the run is on the CPU")


def _packages(section: ZerotopConfig) -> Iterator[tuple[Path, str]]:
    if section.prometheus is not None and not _installed("prometheus_client"):
        yield ("zerotop", "prometheus"), f" needs the package prometheus-client: {install_extra('prometheus')}"
    for index, writer in enumerate(section.writers):
        needs = WRITERS[writer.type]
        if not _installed(needs.module):
            path = ("zerotop", "writers", str(index), "type")
            yield path, f": {writer.type} needs the package {needs.module}: {install_extra(needs.extra)}"


def _installed(module: str) -> bool:
    """A top-level module is found without running it."""
    return importlib.util.find_spec(module) is not None


def _endpoint(endpoint: PrometheusConfig, notes: list[str]) -> Iterator[tuple[Path, str]]:
    path: Path = ("zerotop", "prometheus")
    if endpoint.host not in LOOPBACK and not endpoint.host.startswith("127."):
        notes.append(
            f"zerotop.prometheus.host: whoever reaches port {endpoint.port} of {endpoint.host} can read this run's "
            "metrics; there is no password, and no encryption"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        yield (
            (*path, "host"),
            f": expected an address of this machine, got {clipped(endpoint.host)!r} ({error.strerror})",
        )
        return
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            trial.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            yield (
                (*path, "port"),
                f": {endpoint.port} on {endpoint.host} is in use; choose another, or 0 for a free one",
            )
        elif error.errno == errno.EACCES:
            yield (*path, "port"), f": {endpoint.port} may not be opened by this account; choose one from 1024 on"
        else:
            yield (*path, "host"), f": can't listen on {endpoint.host}: {error.strerror}"


def _receiver(notify: NotifyConfig, path: Path, environment: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    if notify.webhook is not None and notify.webhook.startswith("$"):
        name = notify.webhook[1:].strip("{}")
        value = environment.get(name, "")
        if not value:
            yield (*path, "webhook"), f": the environment variable {clipped(name)} is not set"
        elif why := url_problem(value):
            yield (*path, "webhook"), f": the environment variable {clipped(name)} does not hold a URL: {why}"
    if notify.command is not None and shutil.which(notify.command[0]) is None:
        yield (*path, "command"), f": there is no program {clipped(notify.command[0])}"
