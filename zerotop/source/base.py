"""What every source of a run's state offers, so that the screen and the commands need not know where it comes from."""

from __future__ import annotations

from typing import Protocol

from runtime.wire.messages import Command
from zerotop.state.run import RunState


class SourceError(Exception):
    """A source can't be opened or has broken for good; the message is one for people and says the way out."""


class Source(Protocol):
    """A run's state, kept up to date by whoever calls `poll`. All methods belong to one thread."""

    @property
    def state(self) -> RunState:
        """What is known so far. Only `poll` changes it; a reconnect puts a new object in its place, so keep none."""

    @property
    def connection(self) -> str:
        """`connecting`, `live`, `lost: why` (it goes on trying), or `ended` (the run has; the state is its last)."""

    @property
    def can_control(self) -> bool:
        """Whether `send` can reach anyone: false for recordings and for runs that have ended."""

    def start(self) -> None:
        """Begin listening. Returns at once; what comes is folded in by `poll`."""

    def poll(self) -> bool:
        """Fold what has arrived since the last call into `state`, without ever waiting. True: something changed."""

    def wait(self, timeout_s: float) -> None:
        """Return when something may have arrived, or after `timeout_s`: for loops that poll without a screen."""

    def send(self, command: Command) -> None:
        """Hand a command to the hub; does not wait. `state.commands` then holds its newest state under its id."""

    def age_s(self) -> float | None:
        """Seconds since the hub was last heard; None before the first time, and for recordings."""

    def close(self) -> None:
        """Let go of sockets, processes and temporary files. May be called twice."""
