"""TARGET on the command line: `run`, `user@host`, `user@host:run`, `host:run`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zerotop.output import CommandError

_REMOTE = re.compile(r"(?P<host>(?:[^@:/\s]+@)?(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^@:/\s\[\]]+))(?::(?P<run>.*))?")


@dataclass(frozen=True)
class Target:
    """`host` is None for this machine; `run` is None for the newest live run."""

    host: str | None
    run: str | None


def parse_target(text: str | None) -> Target:
    """An @ or a colon means another machine. Raises CommandError for what is neither that nor a plain name."""
    if not text:
        return Target(None, None)
    if "@" not in text and ":" not in text:
        return Target(None, text)
    match = _REMOTE.fullmatch(text)
    if match is None:
        raise CommandError(f"{text!r} is not a target: expected RUN, user@host or user@host:RUN")
    return Target(checked_host(match["host"].replace("[", "").replace("]", "")), match["run"] or None)


def checked_host(host: str) -> str:
    """`host`. Raises CommandError if ssh would take it for an option."""
    if host.startswith("-") or not host.strip():
        raise CommandError(f"{host!r} is not a host: expected host or user@host")
    return host
