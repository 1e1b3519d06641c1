"""Runs that make no progress although every rank is heard: who is missing in which collective."""

from __future__ import annotations

from typing import Any

from runtime.wire.messages import Heartbeat
from zerotop.format import bytes_text, duration_text
from zerotop.state.stall import explain, find_stall, idle_s, place_text, ranks_text, threshold_s
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding

ENDED_EARLY_S = 3.0
"""A finished rank never enters the collective in which the others stand still for this long."""
STACKS = "`zerotop stacks` shows where every rank is."


def find_desync(figures: Figures) -> Finding | None:
    """Ranks that are in different collectives at the same place of the order: neither can complete as it should."""
    state = figures.state
    if figures.state.state_name not in ("running", "stopping"):
        return None
    seen: dict[int, dict[int, Heartbeat]] = {}
    for rank in figures.present:
        beat = rank.heartbeat
        if beat is not None and beat.entered_op and beat.entered_seq > beat.completed_seq:
            seen.setdefault(beat.entered_seq, {})[rank.rank] = beat
    for seq, beats in sorted(seen.items()):
        kinds = {(beat.entered_op, beat.entered_bytes) for beat in beats.values()}
        if len(kinds) > 1:
            return _desync(seq, {rank: (b.entered_op, b.entered_bytes) for rank, b in sorted(beats.items())})
    mismatch = state.waits.mismatch
    if mismatch is not None:
        return _desync(mismatch.seq, dict(mismatch.reported))
    return None


def _desync(seq: int, reported: dict[int, tuple[str, int | None]]) -> Finding:
    groups: dict[tuple[str, int | None], list[int]] = {}
    for rank, kind in reported.items():
        groups.setdefault(kind, []).append(rank)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    parts = [
        f"{ranks_text(tuple(ranks))} in {op}{f' of {bytes_text(size)}' if size is not None else ''}"
        for (op, size), ranks in ordered
    ]
    # With two equal camps nobody is to blame more than the other.
    lone = len(ordered) > 1 and len(ordered[0][1]) > len(ordered[1][1])
    blamed = tuple(sorted(r for _, ranks in ordered[1:] for r in ranks)) if lone else tuple(sorted(reported))
    return Finding(
        "desync",
        f"the ranks are in different collectives at number {seq}: {'; '.join(parts)}",
        "error",
        blamed,
        "All ranks must run the same modules in the same order: look for a branch that depends on rank or data.",
        {"seq": seq},
    )


def find_hang(figures: Figures) -> Finding | None:
    """No progress for too long, with the ranks that are missing in a collective, or those that do not leave it."""
    state = figures.state
    stall = find_stall(state)
    if stall is None:
        early = _ended_early(figures)
        if early is not None:
            return early
        return None
    idle = duration_text(stall.idle_s)
    facts = {"idle_s": round(stall.idle_s, 1), "seq": stall.seq, "op": stall.op}
    if stall.ended:
        return _early_end(stall.ended, stall.text, facts)
    if stall.missing:
        return Finding("hang", f"no progress for {idle}: {stall.cause}", "error", stall.missing, STACKS, facts)
    if stall.waiting:
        advice = f"A network or GPU fault, or a rank that ended unnoticed: {STACKS[0].lower()}{STACKS[1:]}"
        everyone = len(stall.waiting) == len(figures.present)
        blamed = () if everyone else stall.waiting
        return Finding("hang in transfer", f"no progress for {idle}: {stall.cause}", "error", blamed, advice, facts)
    # Outside any collective: the rank that is furthest behind is the one to look at, if there is one.
    beats = [rank.heartbeat for rank in figures.present if rank.heartbeat is not None]
    places = {place_text(beat) for beat in beats}
    blamed = ()
    if len(places) > 1:
        slowest = min(beats, key=lambda beat: (beat.step, beat.micro_step, beat.progress_ns))
        blamed = (slowest.rank,)
    return Finding("no progress", f"no progress for {idle}: {stall.cause}", "error", blamed, STACKS, facts)


def _ended_early(figures: Figures) -> Finding | None:
    """A rank has finished, and the others stand still in a collective."""
    state = figures.state
    gone = [r for _, r in sorted(state.ranks.items()) if r.goodbye is not None and r.goodbye.outcome == "finished"]
    if state.state_name != "running" or not gone or not figures.present or figures.quiet or figures.warming_up:
        return None
    idle = min(idle_s(rank, state.hub_now_ns) for rank in figures.present)
    in_one = all(r.heartbeat and r.heartbeat.entered_seq > r.heartbeat.completed_seq for r in figures.present)
    if idle < ENDED_EARLY_S or not in_one:
        return None
    stall = explain(state, idle, threshold_s(state))
    if stall is None or not stall.ended:
        return None
    return _early_end(stall.ended, stall.cause, {"idle_s": round(idle, 1), "seq": stall.seq, "op": stall.op})


def _early_end(ranks: tuple[int, ...], text: str, facts: dict[str, Any]) -> Finding:
    return Finding(
        "ended early",
        text,
        "error",
        ranks,
        "Give every rank the same number of batches: drop_last, a sampler that pads, or torch's Join.",
        facts,
    )
