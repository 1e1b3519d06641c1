"""Commands from the hub, as the training thread finds them at a step boundary."""

from __future__ import annotations

import threading
import time
from collections import deque

from runtime.wire.messages import Command

IDS_KEPT = 4096


class Inbox:
    """Filled by the publisher thread in the hub's numbering; read by the training thread.

    Numbers only go up: what is not newer than the last number taken or marked applied is a repetition and is dropped,
    as is an id seen before.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[Command] = []
        self._ids: set[str] = set()
        self._ids_in_order: deque[str] = deque()
        self._newest = 0
        self._done = 0
        self._orphaned = False

    # ---- the training thread ---------------------------------------------------------------------------------------
    def waiting(self) -> bool:
        """Is there a command newer than what was taken? Two integer reads, no lock."""
        return self._newest > self._done

    def take(self) -> list[Command]:
        """Everything that arrived and was not taken yet, in number order."""
        with self._condition:
            taken, self._waiting = self._waiting, []
            if taken:
                self._done = taken[-1].number
            return taken

    def next(self, timeout_s: float) -> Command | None:
        """The oldest command not taken yet, sleeping up to timeout_s (seconds) for it.

        None when the time is over, and at once when the supervisor is gone: ask `orphaned` before calling again.
        """
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while not self._waiting:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._orphaned:
                    return None
                self._condition.wait(remaining)
            command = self._waiting.pop(0)
            self._done = command.number
            return command

    def mark_applied(self, number: int) -> None:
        """Commands up to `number` were applied (a broadcast said so): drop those waiting, and those still to arrive."""
        with self._condition:
            self._done = max(self._done, number)
            self._waiting = [command for command in self._waiting if command.number > number]

    @property
    def orphaned(self) -> bool:
        """The supervisor is gone: checkpoint, stop at the next boundary and leave."""
        return self._orphaned

    # ---- the publisher's threads -----------------------------------------------------------------------------------
    def put(self, command: Command) -> bool:
        """False when the command is a repetition and was dropped."""
        with self._condition:
            if command.number <= self._done or command.id in self._ids:
                return False
            if any(command.number == waiting.number for waiting in self._waiting):
                return False
            self._ids.add(command.id)
            self._ids_in_order.append(command.id)
            if len(self._ids_in_order) > IDS_KEPT:
                self._ids.discard(self._ids_in_order.popleft())
            self._waiting.append(command)
            self._waiting.sort(key=lambda waiting: waiting.number)
            self._newest = max(self._newest, command.number)
            self._condition.notify_all()
            return True

    def mark_orphaned(self) -> None:
        with self._condition:
            self._orphaned = True
            self._condition.notify_all()
