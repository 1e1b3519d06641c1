"""What a process opened is not its forked children's to close. Torch-free.

os.fork() in a script copies everything: handlers that run at exit, finalizers, and descriptors of what the parent still
uses. A child that runs the former on the latter ends the parent's threads, connections and helpers. So whatever is
closed at exit or by a finalizer remembers its process, and does nothing in another one; the kernel closes the child's
copies of the descriptors when the child ends.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from typing import Any


class Owner:
    """The process in which this was made."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self.pid


def at_exit(work: Callable[[], Any]) -> Callable[[], Any]:
    """atexit.register for this process alone. Returns what to give to atexit.unregister."""
    owner = Owner()

    @functools.wraps(work)
    def here() -> Any:
        return work() if owner.is_here else None

    return atexit.register(here)
