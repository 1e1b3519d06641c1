"""Runs that make no progress although every rank is heard: who is missing in which collective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runtime.wire.messages import Event, Heartbeat
from zerotop.format import bytes_text, duration_text
from zerotop.state.run import RunState
from zerotop.state.stall import Stall, explain, find_stall, idle_s, odd_ones_out, place_text, ranks_text, threshold_s
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding

ENDED_EARLY_S = 3.0
"""A finished rank never enters the collective in which the others stand still for this long."""
STACKS = "`zerotop stacks` shows where every rank is."
ONE_ORDER = "All ranks must run the same modules in the same order: look for a branch that depends on rank or data."


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
    blamed = odd_ones_out([ranks for _, ranks in ordered])
    parts = [
        f"{ranks_text(tuple(ranks))} in {op}{f' of {bytes_text(size)}' if size is not None else ''}"
        for (op, size), ranks in ordered
    ]
    return Finding(
        "desync",
        f"the ranks are in different collectives at number {seq}: {'; '.join(parts)}",
        "error",
        blamed,
        ONE_ORDER,
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
    finding = _standstill(figures, stall)
    return finding if stall.ended else _with_flight(state, finding)


def _standstill(figures: Figures, stall: Stall) -> Finding:
    """What the heartbeats say about a run that stands still."""
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


def _with_flight(state: RunState, finding: Finding) -> Finding:
    """With what the Flight Recorders have found since, for collectives of the script's own, too: they are in no
    heartbeat, by which such a run stands still outside of any collective."""
    found = _flight_evidence(state)
    if found is None:
        return finding
    what, ranks, text = found
    finding = replace(finding, text=f"{finding.text}; Flight Recorder: {text}", facts=finding.facts | {"flight": text})
    if what == "different":
        return replace(finding, what="desync", ranks=ranks, advice=ONE_ORDER)
    if finding.what != "no progress":
        return finding
    if what == "missing":
        return replace(finding, what="hang", ranks=ranks)
    everyone = len(ranks) == state.world_size
    return replace(finding, what="hang in transfer", ranks=() if everyone else ranks)


def _flight_evidence(state: RunState) -> tuple[str, tuple[int, ...], str] | None:
    """(what, ranks, sentence) of the first finding about this standstill, as the event of the hang carries it
    (zerotop/diagnose/flight.py); None before."""
    hangs = (one for one in reversed(state.events) if isinstance(one, Event) and one.rank is None)
    event = next((one for one in hangs if one.what == "hang"), None)
    attempt = state.status.attempt if state.status is not None else 0
    if event is None or event.severity != "error" or event.data.get("attempt") != attempt:
        return None
    if (event.step or 0) != state.step:
        return None  # of an earlier one
    for found in event.data.get("flight") or ():
        return str(found["what"]), tuple(int(rank) for rank in found["ranks"]), str(found["text"])
    return None


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
