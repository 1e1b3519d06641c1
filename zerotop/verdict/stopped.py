"""Ranks whose process is gone, stopped, or alive and silent."""

from __future__ import annotations

from zerotop.format import duration_text
from zerotop.probe.processes import GONE
from zerotop.state.condition import SILENT_S, silent_s
from zerotop.state.run import RankState
from zerotop.state.stall import place_text, ranks_text
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding

STOPPED_S = 1.5
"""A rank that is silent for this long and whose process the kernel calls stopped is wedged; otherwise it takes
SILENT_S."""
BUSY_PERCENT = 50.0
"""A silent process that uses more of a CPU than this spins."""
LIVE = frozenset({"running", "stopping", "paused"})


def find_failed(figures: Figures) -> Finding | None:
    """The ranks of the attempt have ended with an error, and the supervisor has found out why."""
    status = figures.state.status
    if status is None or status.state not in ("failed", "restarting"):
        return None
    ranks = (status.failed_rank,) if status.failed_rank is not None else ()
    logs = f"zerotop logs {status.name}" + (f" --rank {ranks[0]}" if ranks else "")
    if status.state == "restarting":
        text = f"restarting after a failure: {status.restart_reason}"
        failed = f" --attempt {status.attempt - 1}" if status.attempt > 1 else ""  # the ranks of the next one start
        advice = f"Wait for the ranks to start again; `{logs}{failed}` has the last lines before the failure."
        return Finding("failed", text, "error", ranks, advice)
    if status.last_checkpoint_step and not status.wrapped:
        advice = f"Continue with: zerotop launch --resume --name {status.name}."
    else:
        advice = f"There is no checkpoint to continue from: fix what `{logs}` shows, and start the run again."
    return Finding("failed", f"the run failed: {status.reason or 'no reason given'}", "error", ranks, advice)


def find_dead(figures: Figures) -> Finding | None:
    """A process that does not exist any more and has not said goodbye."""
    if figures.state.state_name not in LIVE:
        return None
    gone = [
        rank
        for rank in figures.expected
        if _process_state(figures, rank) == GONE and silent_s(rank, figures.state.hub_now_ns) >= STOPPED_S
    ]
    if not gone:
        return None
    numbers = tuple(rank.rank for rank in gone)
    pids = ", ".join(str(rank.hello.pid) for rank in gone if rank.hello is not None)
    those = "process" if len(gone) == 1 else "processes"
    return Finding(
        "dead",
        f"the {those} of {ranks_text(numbers)} (pid {pids}) {'is' if len(gone) == 1 else 'are'} gone",
        "error",
        numbers,
        "The supervisor ends or restarts the attempt; `zerotop logs` has the last lines of the rank.",
    )


def find_wedged(figures: Figures) -> Finding | None:
    """Ranks whose process exists and from which nothing is heard."""
    state = figures.state
    if state.state_name not in LIVE:
        return None
    for rank in figures.expected:
        silent, process = silent_s(rank, state.hub_now_ns), _process_state(figures, rank)
        pid = rank.hello.pid if rank.hello is not None else 0
        place = f"; it was in {place_text(rank.heartbeat)}" if rank.heartbeat is not None else ""
        since = duration_text(silent)
        facts = {"silent_s": round(silent, 1), "process_state": process, "pid": pid}
        if process in ("stopped", "tracing-stop") and silent >= STOPPED_S:
            return Finding(
                "wedged",
                f"rank {rank.rank} (pid {pid}) has been stopped by a signal or a debugger, nothing heard for {since}"
                f"{place}",
                "error",
                (rank.rank,),
                f"`kill -CONT {pid}` lets it go on.",
                facts,
            )
        if silent < SILENT_S:
            continue
        others = [one for one in figures.expected if one is not rank]
        if others and all(silent_s(one, state.hub_now_ns) >= SILENT_S for one in others):
            numbers = tuple(one.rank for one in figures.expected)
            return Finding(
                "wedged",
                f"nothing heard from any rank for {since}: the machine was suspended, or is out of memory or CPU time",
                "error",
                numbers,
                "Look at the machine: `dmesg`, `free`, `top`.",
                facts,
            )
        why, advice = _why(figures, rank, process)
        return Finding(
            "wedged",
            f"nothing heard from rank {rank.rank} (pid {pid}) for {since}: {why}{place}",
            "error",
            (rank.rank,),
            advice,
            facts,
        )
    return None


def _why(figures: Figures, rank: RankState, process: str) -> tuple[str, str]:
    """What keeps a silent process from running Python code, and what to do."""
    node = figures.node_of(rank.rank)
    percent = node.rank_cpu_percent.get(rank.rank) if node is not None else None
    if process == "disk-sleep":
        return (
            "it hangs in the kernel (state D: a disk, a file system or a driver does not answer)",
            "Look at `dmesg`; such a process can't be killed until the kernel lets it go.",
        )
    if process == "zombie":
        return "it has ended, and its parent has not noticed", "The supervisor ends the attempt."
    if percent is not None and percent >= BUSY_PERCENT:
        return (
            f"its process uses {percent:.0f}% of a CPU, so C code spins and holds the GIL",
            "`zerotop stacks` shows the C frames where py-spy is installed.",
        )
    return (
        "its process sleeps, so C code or a driver blocks while it holds the GIL",
        "`zerotop stacks` shows the C frames where py-spy is installed.",
    )


def _process_state(figures: Figures, rank: RankState) -> str:
    node = figures.node_of(rank.rank)
    return node.rank_process.get(rank.rank, "") if node is not None else ""
