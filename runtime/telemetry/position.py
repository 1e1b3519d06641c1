"""How far a rank's collectives have come."""

from __future__ import annotations

from typing import NamedTuple


class CollectivePosition(NamedTuple):
    """Collectives of all groups of a rank together."""

    entered: int
    completed: int
    op: str = ""
    """Name of the newest one; empty while collectives progress."""
    nbytes: int = 0
