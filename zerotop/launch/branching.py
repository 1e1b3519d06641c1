"""Where a branch starts: a checkpoint of another run. Its files are shared as hard links, and the curve up to it is
copied, so that neither run needs the other's directory afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint.format.folder import complete_checkpoints
from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import StepResult
from runtime.wire.rundir import BranchPoint
from zerotop.hub import recorder, timeline
from zerotop.launch.wrapped import refuse_wrapped
from zerotop.rundir.checkpoints import checkpoints_of
from zerotop.rundir.directory import RunEntry
from zerotop.rundir.paths import RunError

TRUNK_ATTEMPT = 0
"""The attempt in whose name the steps before a branch stand in its recording."""


@dataclass(frozen=True)
class Branch:
    """A complete checkpoint of `parent` at `step`."""

    parent: RunEntry
    step: int
    checkpoint: Path

    @property
    def point(self) -> BranchPoint:
        """What the run file says."""
        return BranchPoint(run=self.parent.name, step=self.step, path=str(self.parent.path))


def find_branch(parent: RunEntry, step: int | None) -> Branch:
    """The newest complete checkpoint of `parent`, or that of `step`. Raises RunError with the steps that there are,
    or for a command of the user's own."""
    refuse_wrapped(parent, "branch")
    folder = checkpoints_of(parent)
    found = complete_checkpoints(folder)
    steps = sorted({one.step for one in found})
    if not found:
        way_out = f": zerotop checkpoint {parent.name} makes one" if parent.live else ""
        raise RunError(f"run {parent.name} has no complete checkpoint in {folder} to branch from{way_out}")
    if step is None:
        newest = found[-1]
        return Branch(parent, newest.step, newest.path)
    there = [one for one in found if one.step == step]
    if not there:
        listed = ", ".join(map(str, steps[-12:]))
        raise RunError(f"run {parent.name} has no complete checkpoint at step {step}; there are those of step {listed}")
    return Branch(parent, step, there[-1].path)


def share_checkpoint(branch: Branch, folder: Path) -> None:
    """Make the branch's checkpoint the only one in `folder`, and those of further engines in their folders. Hard links
    where possible: a checkpoint never changes, and deleting one name leaves the other. Raises RunError if it vanished,
    OSError if the disk is full."""
    _share(branch.checkpoint, folder / branch.checkpoint.name)
    for other in sorted(branch.checkpoint.parent.glob("engine-*")):
        earlier = [one for one in complete_checkpoints(other) if one.step <= branch.step]
        if earlier:
            _share(earlier[-1].path, folder / other.name / earlier[-1].path.name)


def _share(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copytree(source, partial, copy_function=_link)
        partial.rename(target)
    except FileNotFoundError:
        raise RunError(f"the checkpoint {source} was pruned meanwhile: choose a newer one") from None
    except shutil.Error as error:
        raise RunError(f"can't take over the checkpoint {source}: {error.args[0][0][2]}") from None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)  # another disk, or one without hard links


def share_trunk(branch: Branch, run: Path) -> None:
    """Begin the recording of the branch with rank 0's steps and evaluations of `parent` up to the branch. A parent
    without a recording, or with a damaged one, has none to share."""
    try:
        parent = timeline.open_recording(branch.parent.path)
    except (OSError, sqlite3.Error):
        return
    path = run / "recording.sqlite"
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(parent), closing(sqlite3.connect(path)) as database, database:
        recorder.create(database)
        try:
            rows = [
                (TRUNK_ATTEMPT, *row)
                for row in parent.execute(
                    "SELECT wall_s, source, kind, body FROM messages "
                    "WHERE source = 'rank/0' AND kind IN ('step', 'evaluation') ORDER BY id"
                )
                if _is_before(row[-1], branch.step)
            ]
        except sqlite3.Error:
            return
        database.executemany(recorder.INSERT, rows)


def _is_before(body: bytes, step: int) -> bool:
    try:
        message = decode_up(body)
    except ProtocolError:
        return False
    return isinstance(message, StepResult | Evaluation) and message.step <= step
