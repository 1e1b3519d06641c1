"""Commands from the hub, which the training thread takes at step boundaries."""

from __future__ import annotations

import threading
import time
from collections import deque

from runtime.wire.messages import Command

IDS_KEPT = 4096


class Inbox:
    """Commands that the publisher thread puts in and the training thread takes out.

    The hub numbers commands upwards. A command whose number is not above the last one taken or applied, or whose id was
    seen before, is a repetition and is dropped.
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
        """Whether there is a command that was not taken: two integer reads without a lock."""
        return self._newest > self._done

    def take(self) -> list[Command]:
        """Take all commands, in the order of their numbers."""
        with self._condition:
            taken, self._waiting = self._waiting, []
            if taken:
                self._done = taken[-1].number
            return taken

    def newest_number(self) -> int:
        """The number of the newest command that waits; 0 if none does."""
        with self._condition:
            return self._waiting[-1].number if self._waiting else 0

    def take_up_to(self, number: int) -> list[Command]:
        """Take the commands numbered up to `number`, in order."""
        with self._condition:
            taken = [command for command in self._waiting if command.number <= number]
            self._waiting = self._waiting[len(taken) :]
            self._done = max(self._done, number)
            return taken

    def next(self, timeout_s: float) -> Command | None:
        """Take the oldest command, or wait up to timeout_s seconds for one.

        Returns None after that time, and at once if the supervisor is gone: check `orphaned` before calling again.
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
        """Drop commands up to `number`, also those that arrive later: a broadcast said that they were applied."""
        with self._condition:
            self._done = max(self._done, number)
            self._waiting = [command for command in self._waiting if command.number > number]

    @property
    def orphaned(self) -> bool:
        """Whether the supervisor is gone: the rank must then save a checkpoint and stop at the next boundary."""
        return self._orphaned

    # ---- the publisher's threads -----------------------------------------------------------------------------------
    def put(self, command: Command) -> bool:
        """Add a command. Returns False if it is a repetition and was dropped."""
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
        """The supervisor is gone: wake `next`."""
        with self._condition:
            self._orphaned = True
            self._condition.notify_all()
