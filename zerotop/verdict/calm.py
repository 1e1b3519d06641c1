"""States in which nothing is wrong, and in which a run may rightly stand still."""

from __future__ import annotations

import statistics

from runtime.wire.watchlines import WATCH_LINE
from zerotop.format import duration_text, ms_text
from zerotop.state.breakdown import PARTS
from zerotop.state.condition import unreported_ranks
from zerotop.state.run import RunState
from zerotop.state.stall import counts_steps, idle_s, is_compiling, place_text, ranks_text
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding

UNSEEN = "steps, phases and loss are not visible: the script does not call watch()"
ONE_LINE = "One line in the script shows them: {}"
LINE_UNKNOWN = f"{WATCH_LINE} (of a Trainer: zerotop run --help)"
WORTH_SAYING = 0.05
"""Parts of the step below this share are left out."""


def calm(figures: Figures) -> Finding:
    """What the run does, if no rule has found anything."""
    state = figures.state
    name = state.state_name
    if name in ("stopped", "finished", "aborted"):
        reason = state.status.reason if state.status is not None else ""
        return Finding("ended", f"the run has ended: {reason or name}", "info")
    if name == "running" and not state.ranks:
        return Finding("unwatched", f"the command runs; {UNSEEN}", "info", advice=_one_line(state))
    left = [rank.goodbye for rank in state.ranks.values() if rank.goodbye is not None]
    if left and len(left) == len(state.ranks) and name != "starting":
        return Finding("ended", "all ranks have left; the supervisor is finding out why", "info")
    if name == "starting" or not figures.present:
        return Finding("starting", _starting(figures), "info")
    if name == "paused":
        return Finding("paused", f"paused at step {state.step}", "info")
    phases = {rank.phase for rank in figures.present}
    if "checkpoint" in phases:
        return Finding("checkpoint", "a checkpoint is being copied; training waits for it", "info")
    if "eval" in phases:
        return Finding("evaluation", "evaluating on held-out data", "info")
    if figures.warming_up:
        return Finding("starting", "the first steps, which are slower: no verdict yet", "info")
    if compiling := [rank for rank in figures.present if is_compiling(rank)]:
        who = ranks_text(tuple(rank.rank for rank in compiling))
        since = duration_text(max(idle_s(rank, state.hub_now_ns) for rank in compiling))
        return Finding("compiling", f"torch.compile compiles on {who}, for {since} so far", "info")
    if not counts_steps(state):
        done = max(rank.heartbeat.completed_seq for rank in figures.present if rank.heartbeat is not None)
        return Finding(
            "unwatched", f"the ranks run, {done:,} collectives so far; {UNSEEN}", "info", advice=_one_line(state)
        )
    return healthy(figures)


def _one_line(state: RunState) -> str:
    """The line for the trainer that the ranks have loaded, as far as they have said so."""
    hello = state.hello
    return ONE_LINE.format(hello.watch_line if hello is not None and hello.watch_line else LINE_UNKNOWN)


def _starting(figures: Figures) -> str:
    """Who has not reported yet, or where those that have are: a start that takes long wants a reason."""
    state = figures.state
    missing = unreported_ranks(state)
    doing = state.status.doing if state.status is not None else ""
    if doing and (not state.world_size or 0 in missing):
        return f"the ranks are starting; rank 0: {doing}"
    if not state.world_size:
        return "the ranks are starting: none has reported yet"
    if missing:
        have = "has" if len(missing) == 1 else "have"
        return f"the ranks are starting: {ranks_text(missing)} {have} not reported yet"
    beats = [rank.heartbeat for rank in figures.present if rank.heartbeat is not None]
    places = sorted({"before the first step" if one.phase == "init" else f"in {place_text(one)}" for one in beats})
    return "the ranks are starting" + (f": {', '.join(places)}" if places else "")


def healthy(figures: Figures) -> Finding:
    """Steps take what they take: where the time goes."""
    ranks = list(figures.breakdowns.values())
    means = {part: statistics.fmean(b.share(part) for b in ranks) for part in PARTS} if ranks else {}
    told = [(part, share) for part, share in means.items() if share >= WORTH_SAYING]
    shares = ", ".join(f"{share:.0%} {part}" for part, share in sorted(told, key=lambda item: -item[1]))
    text = f"healthy: {ms_text(figures.step_ms)} a step" + (f", {shares}" if shares else "")
    facts = {"step_ms": round(figures.step_ms, 1)} | {f"{part}_share": round(share, 3) for part, share in means.items()}
    return Finding("healthy", text, "info", facts=facts)
