"""The work order for one rank's part of a checkpoint.   (torch-free)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runtime.checkpoint.format.manifest import CheckpointError, Manifest, root_cause
from runtime.checkpoint.format.slices import Part


class Peers(Protocol):
    """The processes that write one checkpoint together: the ranks, or their writer processes."""

    rank: int
    world_size: int

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. Collective."""
        ...


@dataclass(frozen=True)
class SaveOptions:
    """A script's choices for save_checkpoint()."""

    latest: bool = True
    """Whether FOLDER/latest names it and a resume may start from it."""
    with_frozen: bool = True
    """Whether it includes parameters that are not trained."""


SAVE_DEFAULTS = SaveOptions()


@dataclass(frozen=True)
class Place:
    """Where the writer finds a part: at byte `at` of the shared memory, or (None) in a slot, on request."""

    part: Part
    at: int | None


@dataclass(frozen=True)
class Job:
    """One rank's part of the checkpoint FOLDER/TAG."""

    folder: Path
    tag: str
    parts: Sequence[Part]
    files: Mapping[str, bytes]
    """Contents of this rank's small files by name, which may be a path such as model/config.json."""
    manifest: Manifest | None = None
    """On rank 0; the writing fills in its number and files."""
    keep: int = 0
    """Number of newest step checkpoints to keep afterwards; 0: all."""
    keep_every: int = 0
    """Every so many-th checkpoint is kept for good; 0: none."""
    refuses_nan: bool = False
    """Whether a parameter with NaN fails the save: in adapters, which are small, it is looked for."""
    problem: str = field(default="")
    """Why this rank cannot save, which becomes the error on every rank; empty if it can."""

    @property
    def final(self) -> Path:
        """Path of the complete checkpoint."""
        return self.folder / self.tag


def on_rank_0(peers: Peers, what: str, action: Callable[[], Any]) -> None:
    """Run `action` on rank 0. If it fails, raise CheckpointError("could not <what>: ...") on every rank. Collective."""
    problem = ""
    if peers.rank == 0:
        try:
            action()
        except CheckpointError as error:
            problem = f"could not {what}: {error}"
        except OSError as error:
            problem = f"could not {what}: {error.strerror or error}"
        except Exception as error:
            problem = f"could not {what}: {root_cause(error)}"
    problem = peers.broadcast_object(problem)
    if problem:
        raise CheckpointError(problem)
