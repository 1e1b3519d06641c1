"""Keeps forked children from closing what their parent has opened. Torch-free.

os.fork() in a script copies exit handlers, finalizers and the descriptors that the parent still uses. A child that runs
those handlers would end the parent's threads, connections and helpers. So exit handlers and finalizers remember their
process and do nothing in another one; the kernel closes the child's copies of descriptors when the child ends.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from typing import Any


class Owner:
    """Remembers the process in which it was made."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process in which it was made, and not a forked child."""
        return os.getpid() == self.pid


def at_exit(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run `work` at the exit of this process, but not of its forked children. Returns the argument of
    atexit.unregister."""
    owner = Owner()

    @functools.wraps(work)
    def here() -> Any:
        return work() if owner.is_here else None

    return atexit.register(here)
