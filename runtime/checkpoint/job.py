"""One rank's part of a checkpoint that is to be written, and what the ranks must agree on. (Without
torch.distributed.checkpoint.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runtime.checkpoint.capture import Part
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, root_cause


class Peers(Protocol):
    """The processes that write one checkpoint."""

    rank: int
    world_size: int

    def broadcast_object(self, value: Any) -> Any: ...
    def gather_objects(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Options:
    """What a script may want of a checkpoint."""

    latest: bool = True
    """A resume may begin from it, and FOLDER/latest names it."""
    with_frozen: bool = True
    """Parameters that are not trained are in it."""


DEFAULTS = Options()


@dataclass(frozen=True)
class Job:
    """One rank's part of a checkpoint."""

    folder: Path
    tag: str
    parts: Sequence[Part]
    files: Mapping[str, bytes]
    """Small files of this rank, by name; a name may have a folder in it."""
    manifest: Manifest | None = None
    """Rank 0's; its number and files are filled in."""
    keep: int = 0
    """Afterwards, so many step checkpoints stay; 0: all."""
    keep_every: int = 0
    problem: str = field(default="")
    """Why this rank can't take part: everyone's error then."""

    @property
    def final(self) -> Path:
        return self.folder / self.tag


def on_rank_0(peers: Peers, what: str, action: Callable[[], Any]) -> None:
    """Run `action` on rank 0 only, and let its failure be everyone's, so that no rank waits for one that gave up."""
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
