"""A range of a recording as a table: one row per step, or one row per frame and rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zerotop.recording.playback import Playback
from zerotop.state.memory import gpu_of
from zerotop.state.run import RankState, RunState

Table = tuple[tuple[str, ...], Iterator[tuple[Any, ...]]]
"""The names of the columns, and the rows; None where there is no figure."""
STEP_COLUMNS = (
    "wall_s",
    "attempt",
    "step",
    "loss",
    "lr",
    "grad_norm",
    "step_ms",
    "tokens_per_s",
    "samples_per_s",
    "wait_ms",
    "comm_bytes",
    "loss_scale",
    "skipped",
    "evaluation_loss",
)
RANK_COLUMNS = (
    "wall_s",
    "attempt",
    "rank",
    "phase",
    "step",
    "micro_step",
    "step_ms",
    "wait_ms",
    "tokens_per_s",
    "rss_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "device_used_bytes",
    "pinned_bytes",
    "gpu_utilization_percent",
    "gpu_power_w",
    "gpu_temperature_c",
)


def steps_table(playback: Playback, from_s: float, to_s: float) -> Table:
    """The steps of [from_s, to_s] as rank 0 has reported them: loss and norm are the run's, times are rank 0's."""
    return STEP_COLUMNS, _steps(playback, from_s, to_s)


def _steps(playback: Playback, from_s: float, to_s: float) -> Iterator[tuple[Any, ...]]:
    evaluated: dict[int, float | None] = {}
    for _, one in playback.curve("evaluation", from_s, to_s):
        evaluated[one.step] = one.loss
    for row, one in playback.curve("step", from_s, to_s):
        yield (
            row.wall_s,
            row.attempt,
            one.step,
            one.loss,
            one.lr,
            one.grad_norm,
            one.step_ms,
            one.tokens_per_s,
            one.samples_per_s,
            one.wait_ms,
            one.comm_bytes,
            one.loss_scale,
            one.skipped,
            evaluated.get(one.step),
        )


def ranks_table(playback: Playback, from_s: float, to_s: float) -> Table:
    """The state of every rank at the end of each frame of [from_s, to_s]."""
    return RANK_COLUMNS, _ranks(playback, from_s, to_s)


def _ranks(playback: Playback, from_s: float, to_s: float) -> Iterator[tuple[Any, ...]]:
    frames = playback.frames
    first, last = frames.at(from_s), frames.at(to_s)
    state = playback.state_at(first)
    for number in range(first, last + 1):
        end_s = frames.span(number)[1]
        if number > first:
            playback.advance(state, frames.span(number - 1)[1], end_s)
        for _, rank in sorted(state.ranks.items()):
            yield (end_s, state.status.attempt if state.status else 0, *_rank_row(state, rank))


def _rank_row(state: RunState, rank: RankState) -> tuple[Any, ...]:
    beat, step, memory, gpu = rank.heartbeat, rank.step, rank.memory, gpu_of(state, rank)
    return (
        rank.rank,
        rank.phase,
        step.step if step else None,
        beat.micro_step if beat else None,
        step.step_ms if step else None,
        step.wait_ms if step else None,
        step.tokens_per_s if step else None,
        memory.rss_bytes if memory else None,
        memory.allocated_bytes if memory else None,
        memory.reserved_bytes if memory else None,
        memory.device_used_bytes if memory else None,
        memory.pinned_bytes if memory else None,
        gpu.utilization_percent if gpu else None,
        gpu.power_w if gpu else None,
        gpu.temperature_c if gpu else None,
    )
