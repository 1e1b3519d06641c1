"""What every source of a run offers, so that the screen and the commands need not know where the state comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from runtime.wire.messages import Command
from zerotop.state.run import RunState


class SourceError(Exception):
    """A source cannot be opened, or has failed for good. The message is for the user and says what to do."""


class Source(Protocol):
    """The state of a run, kept up to date by whoever calls `poll`. All methods belong to one thread."""

    @property
    def state(self) -> RunState:
        """The state so far. Only `poll` changes it. A reconnect replaces the object, so do not keep it."""

    @property
    def run_path(self) -> Path | None:
        """The run directory; None if it is not on this machine."""

    @property
    def connection(self) -> str:
        """`connecting`, `live`, `lost: why` (it keeps trying), or `ended` (the run has ended; the state is its
        last), or `replay`."""

    @property
    def can_control(self) -> bool:
        """Whether `send` can reach a hub: false for recordings and for runs that have ended."""

    def start(self) -> None:
        """Begin to listen. Returns at once; `poll` folds what arrives."""

    def poll(self) -> bool:
        """Fold what has arrived since the last call into `state`, without waiting. True if something changed."""

    def wait(self, timeout_s: float) -> None:
        """Return when something may have arrived, or after `timeout_s`: for loops without a screen."""

    def send(self, command: Command) -> None:
        """Send a command to the hub, without waiting. `state.commands` then holds its newest state under its id."""

    def age_s(self) -> float | None:
        """Seconds since the hub was last heard; None before the first time, and for recordings."""

    def close(self) -> None:
        """Close sockets, processes and temporary files. May be called twice."""
