"""The confusion matrix of verdicts over simulated runs, and over recordings of real ones.

    python -m benchmarks.verdicts.matrix --runs 100 --markdown benchmarks/results/verdicts.md

Each fault is simulated --runs times (model.py), mixed with as many healthy runs. Each recording of a real run (live.py
--record) is replayed as often, each time with other numbers of the ranks, another speed, noise, lost packets and a hub
that comes later (replaying.py). A run counts as right when the verdict
is the right one, with the right rank, within 15 s after the fault, and still at the end. Any warning in a healthy run
is a false alarm.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.context import markdown, measured_on, table
from benchmarks.verdicts.faults import FAULTS, LIVE_FAULTS, Fault
from benchmarks.verdicts.model import SimulatedRun
from benchmarks.verdicts.packets import packets
from benchmarks.verdicts.recording import Recording, read_recording, recordings
from benchmarks.verdicts.replaying import Perturbation
from benchmarks.verdicts.replaying import packets as replayed
from runtime.wire.messages import Packet
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
    run = SimulatedRun(fault, seed, seconds_long)
    return _judge_packets(packets(run), fault, seed, run.faulty, run.fault_s)


def judge_replay(recording: Recording, fault: Fault, seed: int) -> Judged:
    """Replay a recording, perturbed by this seed, and judge it twice a second."""
    change = Perturbation.drawn(seed, recording)
    offset_s = random.Random(seed).uniform(0.0, LOOK_S)
    faulty, fault_s = change.ranks[recording.faulty], recording.fault_s * change.speed
    known = ("contention",) if recording.loaded else ()
    return _judge_packets(replayed(recording, change), fault, seed, faulty, fault_s, offset_s, known)


def _judge_packets(
    timed: Iterator[tuple[float, Packet]],
    fault: Fault,
    seed: int,
    faulty: int,
    fault_s: float,
    looked: float = 0.0,
    known: tuple[str, ...] = (),
) -> Judged:
    """Fold packets and look every LOOK_S from second `looked` on. known: warnings that are right before the fault,
    too."""
    state, judge = RunState(), Judge()
    seconds, changes, alarms, ended_s = None, 0, list[str](), 0.0
    before: Finding | None = None
    for at_s, packet in itertools.chain(timed, [(math.inf, None)]):
        # The last packet is looked at, too.
        while looked + LOOK_S <= (at_s if packet is not None else ended_s + 2 * LOOK_S):
            looked += LOOK_S
            found = judge.look(state, looked)
            if not found.same_as(before):
                changes += before is not None and {before.severity, found.severity} != {"info"}
                wrong = not is_what(found, fault) if fault.calm else looked < fault_s
                if found.severity != "info" and wrong and found.what not in known:
                    alarms.append(f"{found.what} {list(found.ranks)} at {looked:.0f} s")
            before = found
            if seconds is None and looked >= fault_s and is_right(found, fault, faulty):
                seconds = looked - fault_s
        if packet is not None:
            ended_s = at_s
            state.apply_packet(packet)
    assert before is not None
    good = is_right(before, fault, faulty)
    right = good and (fault.calm or (seconds is not None and seconds <= LIMIT_S))
    final = before.what if good or is_what(before, fault) is False else f"{before.what}, wrong rank"
    return Judged(fault.name, seed, seconds, final, right and not (fault.calm and alarms), changes, tuple(alarms))


def is_what(found: Finding, fault: Fault) -> bool:
    """Whether the kind of verdict is right."""
    return found.what in fault.what or (fault.calm and found.severity == "info")


def is_right(found: Finding, fault: Fault, faulty: int) -> bool:
    """Whether kind and ranks are right."""
    blamed = {"one": found.ranks == (faulty,), "none": found.ranks == (), "any": True}[fault.ranks]
    return is_what(found, fault) and blamed


def _judge(task: tuple[int, int, float]) -> Judged:
    return judge(FAULTS[task[0]], task[1], task[2])


def _judge_replay(task: tuple[Path, int]) -> Judged:
    recording = _read(task[0])
    return judge_replay(recording, LIVE_FAULTS[recording.fault], task[1])


@functools.cache
def _read(path: Path) -> Recording:
    return read_recording(path)


def report(judged: list[Judged], pipes: bool) -> str:
    """The matrix and its sums as text."""
    rows = []
    for name in dict.fromkeys(one.fault for one in judged):
        ones = [one for one in judged if one.fault == name]
        took = sorted(one.seconds for one in ones if one.seconds is not None)
        finals = ", ".join(f"{what} {count}" for what, count in Counter(one.final for one in ones).most_common())
        rows.append(
            [
                name,
                f"{sum(one.right for one in ones)}/{len(ones)}",
                f"{statistics.median(took):.1f} s" if took and not LIVE_FAULTS[name].calm else "",
                f"{took[-1]:.1f} s" if took and not LIVE_FAULTS[name].calm else "",
                str(sum(bool(one.alarms) for one in ones)),
                finals,
            ]
        )
    faulty = [one for one in judged if not LIVE_FAULTS[one.fault].calm]
    healthy = [one for one in judged if LIVE_FAULTS[one.fault].calm]
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
        early = sum(bool(one.alarms) for one in faulty) / max(1, len(faulty))
        lines.append(
            f"False alarms: {alarms / len(healthy):.1%} of {len(healthy)} runs without a fault (at most {most} changes "
            f"from or to bad news in one), and {early:.1%} of the others before their fault."
        )
    return "\n".join(lines)


def _followed(judged: Iterator[Judged], count: int) -> list[Judged]:
    """All of them, with a line on the progress now and then."""
    found: list[Judged] = []
    for one in judged:
        found.append(one)
        if len(found) % 50 == 0:
            print(f"{len(found)}/{count}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run")
    parser.add_argument("--only", help="one kind of fault")
    parser.add_argument("--recorded", action="store_true", help="only the recordings of real runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wrong", action="store_true", help="list the runs that went wrong")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.runs)
    chosen = [number for number, fault in enumerate(FAULTS) if options.only in (None, fault.name)]
    tapes = [path for path in recordings() if options.only in (None, _read(path).fault)]
    tables: dict[str, list[Judged]] = {}
    with ProcessPoolExecutor(options.workers) as pool:
        if chosen and not options.recorded:
            tasks = [(number, seed, options.seconds) for number in chosen for seed in seeds]
            tables["Simulated runs"] = _followed(pool.map(_judge, tasks, chunksize=4), len(tasks))
        if tapes:
            replays = [(path, seed) for path in tapes for seed in seeds]
            tables["Recordings of real runs, replayed"] = _followed(
                pool.map(_judge_replay, replays, chunksize=4), len(replays)
            )
    for title, judged in tables.items():
        print(title, report(judged, pipes=False), sep="\n", end="\n\n")
        for one in judged if options.wrong else ():
            if not one.right or one.alarms:
                print(f"{one.fault} {one.seed}: {one.final} after {one.seconds} s, {one.changes} changes", one.alarms)
    if options.markdown:
        context = measured_on("benchmarks.verdicts.matrix", ("pydantic",))
        body = "\n\n".join(f"## {title}\n{report(judged, pipes=True)}" for title, judged in tables.items())
        loads = [f"- {_read(path).fault}: {_read(path).load_text}" for path in tapes]
        body += "\n\nThe machine while the real runs were recorded:\n\n" + "\n".join(loads) if loads else ""
        options.markdown.write_text(markdown("Verdicts over simulated and recorded runs", context, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
