"""What of the outputs' settings can't be used together."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from .errors import Findings, Path, clipped, nearest
from .outputs import NOTICES, WRITERS, NotifyConfig, WriterConfig
from .zerotop import ZerotopConfig


def check_outputs(section: ZerotopConfig, found: Findings) -> None:
    """Record problems of zerotop.writers, zerotop.alerts and zerotop.notify."""
    _check_writers(section.writers, found)
    names: dict[str, int] = {}
    for index, alert in enumerate(section.alerts):
        name = alert.name or alert.rule
        path: Path = ("zerotop", "alerts", str(index))
        if alert.name in NOTICES:
            found.problem(
                (*path, "name"), f": {alert.name} is a condition of its own in zerotop.notify; choose another"
            )
        if name in names:
            found.problem(path, f": zerotop.alerts.{names[name]} has the same name, {clipped(name)}; give one of them "
                          "another `name`")  # fmt: skip
        if name not in NOTICES:
            names.setdefault(name, index)
    for index, notify in enumerate(section.notify):
        _check_notify(notify, ("zerotop", "notify", str(index)), [*NOTICES, *names], found)


def _check_writers(writers: tuple[WriterConfig, ...], found: Findings) -> None:
    places: dict[tuple[str | None, ...], int] = {}
    for index, writer in enumerate(writers):
        path: Path = ("zerotop", "writers", str(index))
        takes = WRITERS[writer.type].keys
        for key in ("folder", "project", "uri"):
            if getattr(writer, key) is not None and key not in takes:
                found.problem((*path, key), f": {writer.type} has no {key}. Keys of {writer.type}: "
                              f"{', '.join((*takes, 'name', 'interval'))}")  # fmt: skip
        folder = os.path.normpath(writer.folder) if writer.folder else None
        place = (writer.type, folder, writer.project, writer.uri, writer.name)
        if place in places:
            found.problem(path, f": zerotop.writers.{places[place]} writes the same metrics to the same place; keep "
                          f"one, or give it another {' or '.join((*takes, 'name'))}")  # fmt: skip
        places.setdefault(place, index)


def _check_notify(notify: NotifyConfig, path: Path, names: list[str], found: Findings) -> None:
    if (notify.webhook is None) == (notify.command is None):
        both = "both are given; keep one" if notify.webhook else 'expected "webhook": URL, or "command": [PROGRAM, ...]'
        found.problem(path, f": {both}")
    if notify.webhook is not None and not notify.webhook.startswith("$") and (why := url_problem(notify.webhook)):
        found.problem((*path, "webhook"), f": expected a URL such as https://example.com/hook, or $NAME; {why}")
    for name in notify.on:
        if name not in names:
            near = nearest(name, names)
            hint = f"Did you mean {near}? " if near else ""
            found.problem((*path, "on"), f": unknown condition {clipped(name)}. {hint}Known: {', '.join(names)}")


def url_problem(url: str) -> str:
    """Why a webhook's URL can't be used; empty if it can. The URL, which is a secret, is not repeated."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error) if "port" in str(error).lower() else "it is not a URL"
    if parts.scheme not in ("http", "https"):
        return f"its scheme is {clipped(parts.scheme, 20)!r}" if parts.scheme else "it has no scheme"
    if not parts.hostname:
        return "it names no host"
    if any(char.isspace() or not char.isprintable() for char in url):
        return "it contains spaces or control characters"
    return "its port is 0" if port == 0 else ""
