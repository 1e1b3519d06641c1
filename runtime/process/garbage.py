"""How often Python's garbage collector looks for cycles of objects.

It counts new objects, and every so often looks at all there are. In a process that has imported Textual or torch these
are hundreds of thousands which live as long as the process: looking at them again and again takes a tenth of an import
and of the time of a screen, and a third of the time of tests.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 20_000
"""New objects after which the collector looks at the youngest. Python's own figure is 700 to 2,000."""


def collect_less_often() -> None:
    """For a process whose objects are small. Not for one that trains: a cycle there may hold gigabytes of tensors."""
    gc.set_threshold(NEW_OBJECTS, 10, 10)


def keep_all_objects() -> None:
    """Let the collector never again look at the objects that there are now, for most of them stay: those of imported
    modules. A cycle among them is never freed."""
    gc.freeze()


@contextmanager
def importing() -> Iterator[None]:
    """Import inside: nothing is collected, and what came is kept."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        keep_all_objects()
        if was_enabled:
            gc.enable()
