"""The confusion matrix of verdicts over simulated runs.

    python -m benchmarks.verdicts.matrix --runs 100 --markdown benchmarks/results/verdicts.md

Each fault is simulated --runs times (runs.py), mixed with as many healthy runs. A run counts as right when the verdict
is the right one, with the right rank, within 15 s after the fault, and still at the end. Any warning in a healthy run
is a false alarm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.context import markdown, measured_on, table
from benchmarks.verdicts.faults import FAULTS, Fault
from benchmarks.verdicts.model import SimulatedRun
from benchmarks.verdicts.packets import packets
from zerotop.state.run import RunState
from zerotop.verdict.finding import Finding
from zerotop.verdict.judge import Judge

LOOK_S = 0.5
LIMIT_S = 15.0


@dataclass(frozen=True)
class Judged:
    """What became of one run. seconds: from the fault to the first right verdict; None if there was none."""

    fault: str
    seed: int
    seconds: float | None
    final: str
    right: bool
    changes: int
    """Changes of the verdict from or to bad news."""
    alarms: tuple[str, ...]
    """Wrong warnings: in a healthy run any, in others those before the fault."""


def judge(fault: Fault, seed: int, seconds_long: float) -> Judged:
    """Simulate one run and judge it twice a second."""
    run, state, judge = SimulatedRun(fault, seed, seconds_long), RunState(), Judge()
    looked, seconds, changes, alarms = 0.0, None, 0, []
    before: Finding | None = None
    for at_s, packet in packets(run):
        while looked + LOOK_S <= at_s:
            looked += LOOK_S
            found = judge.look(state, looked)
            if not found.same_as(before):
                changes += before is not None and {before.severity, found.severity} != {"info"}
                early = looked < run.fault_s or fault.name == "healthy"
                if found.severity != "info" and early:
                    alarms.append(f"{found.what} {list(found.ranks)} at {looked:.0f} s")
            before = found
            if seconds is None and looked >= run.fault_s and is_right(found, fault, run.faulty):
                seconds = looked - run.fault_s
        state.apply_packet(packet)
    assert before is not None
    good = is_right(before, fault, run.faulty)
    right = good and (fault.name == "healthy" or (seconds is not None and seconds <= LIMIT_S))
    final = before.what if good or is_what(before, fault) is False else f"{before.what}, wrong rank"
    return Judged(
        fault.name, seed, seconds, final, right and not (fault.name == "healthy" and alarms), changes, tuple(alarms)
    )


def is_what(found: Finding, fault: Fault) -> bool:
    """Whether the kind of verdict is right."""
    return found.what in fault.what or (fault.name == "healthy" and found.severity == "info")


def is_right(found: Finding, fault: Fault, faulty: int) -> bool:
    """Whether kind and ranks are right."""
    blamed = {"one": found.ranks == (faulty,), "none": found.ranks == (), "any": True}[fault.ranks]
    return is_what(found, fault) and blamed


def _judge(task: tuple[int, int, float]) -> Judged:
    return judge(FAULTS[task[0]], task[1], task[2])


def report(judged: list[Judged], pipes: bool) -> str:
    """The matrix and its sums as text."""
    by_fault = {fault.name: [one for one in judged if one.fault == fault.name] for fault in FAULTS}
    rows = []
    for name, ones in by_fault.items():
        if not ones:
            continue
        took = sorted(one.seconds for one in ones if one.seconds is not None)
        finals = ", ".join(f"{what} {count}" for what, count in Counter(one.final for one in ones).most_common())
        rows.append(
            [
                name,
                f"{sum(one.right for one in ones)}/{len(ones)}",
                f"{statistics.median(took):.1f} s" if took and name != "healthy" else "",
                f"{took[-1]:.1f} s" if took and name != "healthy" else "",
                str(sum(bool(one.alarms) for one in ones)),
                finals,
            ]
        )
    faulty = [one for one in judged if one.fault != "healthy"]
    healthy = by_fault.get("healthy", [])
    took = sorted(one.seconds for one in faulty if one.seconds is not None)
    header = ["fault", "right", "median", "worst", "false alarms", "verdicts at the end"]
    lines = [table(header, rows, pipes=pipes), ""]
    if faulty and took:
        lines.append(
            f"Right verdict and rank: {sum(one.right for one in faulty) / len(faulty):.1%} of {len(faulty)} faulty "
            f"runs; time to verdict {statistics.median(took):.1f} s median, {took[-1]:.1f} s worst."
        )
    if healthy:
        alarms, most = sum(bool(one.alarms) for one in healthy), max(one.changes for one in healthy)
        lines.append(
            f"False alarms: {alarms / len(healthy):.1%} of {len(healthy)} healthy runs (at most {most} changes from or "
            f"to bad news in one), and {sum(bool(one.alarms) for one in faulty) / max(1, len(faulty)):.1%} of the "
            "others before their fault."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run")
    parser.add_argument("--only", help="one kind of fault")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wrong", action="store_true", help="list the runs that went wrong")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    tasks = [
        (number, seed, options.seconds)
        for seed in range(options.first, options.first + options.runs)
        for number, fault in enumerate(FAULTS)
        if options.only in (None, fault.name)
    ]
    judged: list[Judged] = []
    with ProcessPoolExecutor(options.workers) as pool:
        for one in pool.map(_judge, tasks, chunksize=4):
            judged.append(one)
            if len(judged) % 50 == 0:
                print(f"{len(judged)}/{len(tasks)}", file=sys.stderr, flush=True)
    print(report(judged, pipes=False))
    if options.wrong:
        for one in judged:
            if not one.right or one.alarms:
                print(f"{one.fault} {one.seed}: {one.final} after {one.seconds} s, {one.changes} changes", one.alarms)
    if options.markdown:
        context = measured_on("benchmarks.verdicts.matrix", ("pydantic",))
        options.markdown.write_text(markdown("Verdicts over simulated runs", context, report(judged, pipes=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
