"""Which checkpoint of a run is worth most: the one nearest its best evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.wire.messages import CheckpointSaved
from zerotop.state.run import RunState
from zerotop.state.settings import known_values


@dataclass(frozen=True)
class BestCheckpoint:
    """`step` is that of the checkpoint, `of` what it is the nearest to: "the best evaluation" or "the lowest loss"."""

    step: int
    of: str


def checkpoints_on_disk(state: RunState) -> list[int]:
    """The steps of the checkpoints that have not been deleted for newer ones, as far as is known here, by rising step.
    The best evaluation's is kept however old it is."""
    status = state.status
    saved = {record.step for record in state.events if isinstance(record, CheckpointSaved)}
    if status is not None and status.last_checkpoint_step is not None:
        saved.add(status.last_checkpoint_step)
    steps = sorted(saved)
    kept = known_values(state).get("checkpoints_kept")
    best = state.evaluations.best
    newest = steps[-int(kept) :] if kept else steps
    return [step for step in steps if step in newest or (best is not None and step == best.step)]


def best_checkpoint(state: RunState) -> BestCheckpoint | None:
    """The checkpoint nearest the best evaluation; of a run without any, nearest its lowest loss. The newer of two that
    are equally near. None without a checkpoint, or without a loss."""
    best = state.evaluations.best
    if best is not None:
        target, of = best.step, "the best evaluation"
    else:
        losses = [(one.loss, one.step) for one in state.series if one.loss is not None and math.isfinite(one.loss)]
        if not losses:
            return None
        target, of = min(losses)[1], "the lowest loss"
    there = checkpoints_on_disk(state)
    return BestCheckpoint(min(there, key=lambda step: (abs(step - target), -step)), of) if there else None
