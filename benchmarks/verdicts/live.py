"""Real faults in real runs of two ranks on the CPU: is the verdict right, and how soon?

    python -m benchmarks.verdicts.live --rounds 3 --markdown benchmarks/results/verdicts-live.md

Each round launches a run per fault (script.py), waits until it trains, injects the fault, and reads the verdicts that
the hub publishes, as a screen does. With --pictures FOLDER the screen is saved as it is then; with --record FOLDER the
messages are kept (recording.py), for the matrix to replay. With --calm-seconds 600 the runs with which nothing is wrong
are watched for so long, and the changes of their verdicts are counted. "slow link" and "transfer hangs" need root, for
a network namespace of their own and tc; so does "cold file", for a control group.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.context import ROOT, markdown, measured_on, table
from benchmarks.verdicts.faults import LIVE_FAULTS, Fault
from benchmarks.verdicts.matrix import is_right
from benchmarks.verdicts.recording import FOLDER, Tape, write_recording
from runtime.wire.judgement import Verdict
from runtime.wire.messages import LIVE_STATES
from zerotop.rundir.directory import RunEntry, find_any_run, read_entry
from zerotop.source.opening import open_source
from zerotop.state.run import RunState
from zerotop.tui.app import ZerotopApp
from zerotop.verdict.finding import Finding

FAULTY = 1
AT_STEP = 40
TRAINS_S, VERDICT_S = 90.0, 30.0
CALM_S = 30.0
RECORDED_S, CALM_RECORDED_S = 22.0, 45.0
"""How long after the fault a recording ends, and how long one without a fault is after its first steps."""
POLL_S = 0.05
QUIET_S = 3.0
"""The probe reports once a second: a hub of which nothing is heard for so long has ended."""
HOGS = 3
"""Busy processes on the CPU of one rank; of a loaded machine, on each CPU."""
HOG = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Computes until whoever started it has ended."""
MEMORY_LIMIT = 48 * 2**20
"""Bytes of the control group in which a rank reads from disk: less than the file that it has mapped."""
RATE = "300mbit"
PICTURE = (150, 16)
"""Columns and lines of a picture."""


class Injection:
    """What a fault does from outside; it is undone by `end`."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self._group: Path | None = None

    def stop(self, entry: RunEntry, pids: list[int]) -> None:
        os.kill(pids[FAULTY], signal.SIGSTOP)

    def kill(self, entry: RunEntry, pids: list[int]) -> None:
        os.kill(pids[FAULTY], signal.SIGKILL)

    def hogs(self, entry: RunEntry, pids: list[int]) -> None:
        """Processes that only compute, on the CPU of the faulty rank."""
        cpus = sorted(os.sched_getaffinity(0))
        for rank, pid in enumerate(pids):
            for thread in psutil.Process(pid).threads():
                os.sched_setaffinity(thread.id, {cpus[rank % len(cpus)]})
        for _ in range(HOGS):
            os.sched_setaffinity(self._start_hog(), {cpus[FAULTY % len(cpus)]})

    def load(self) -> None:
        """Processes that only compute, on whatever CPU the kernel gives them."""
        for _ in range(HOGS * len(os.sched_getaffinity(0))):
            self._start_hog()

    def _start_hog(self) -> int:
        self.children.append(subprocess.Popen([sys.executable, "-c", HOG]))
        return self.children[-1].pid

    def link(self, entry: RunEntry, pids: list[int]) -> None:
        """Limit the loopback of the run's network namespace."""
        self._shape(pids, "rate", RATE, "burst", "128kb", "latency", "100ms")

    def cut(self, entry: RunEntry, pids: list[int]) -> None:
        """Let so little through the loopback of the run's network namespace that no transfer ends."""
        self._shape(pids, "rate", "256kbit", "burst", "128kb", "latency", "3s")

    def _shape(self, pids: list[int], *how: str) -> None:
        words = ["nsenter", "-t", str(pids[0]), "-n", "tc", "qdisc", "add", "dev", "lo", "root", "tbf"]
        subprocess.run([*words, *how], check=True)

    def limit_memory(self, entry: RunEntry, pids: list[int]) -> None:
        """Put the faulty rank into a control group (version 1 or 2) that holds less than it reads."""
        first = Path("/sys/fs/cgroup/memory")
        self._group = (first if first.is_dir() else first.parent) / f"zerotop-{entry.name}"
        self._group.mkdir()
        limit = "memory.limit_in_bytes" if first.is_dir() else "memory.high"
        (self._group / limit).write_text(str(MEMORY_LIMIT))
        (self._group / "cgroup.procs").write_text(str(pids[FAULTY]))

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()

    def end_after_run(self) -> None:
        """What can only be undone when no process of the run is left."""
        if self._group is not None:
            self._group.rmdir()


@dataclass(frozen=True)
class LiveFault:
    """`script`: arguments of script.py; `inject`: the method of Injection that causes the fault; `namespace`: in a
    network namespace of its own, with collectives over Gloo; `launch`: more arguments of zerotop launch; `loaded`:
    other processes compute on all CPUs from the start of the run."""

    fault: Fault
    script: tuple[str, ...] = ()
    inject: str = ""
    namespace: bool = False
    launch: tuple[str, ...] = ()
    loaded: bool = False

    @property
    def file_name(self) -> str:
        """Of its picture and its recording, without the ending."""
        return self.fault.name.replace(" ", "-").lower()


_AT_STAGE_3 = (
    "--set",
    "zero_optimization.stage=3",
    "--set",
    "zero_optimization.stage3_param_persistence_threshold=0",
)
_OFFLOADED = (
    "--set",
    "zero_optimization.offload_optimizer.device=cpu",
    "--set",
    "gradient_accumulation_steps=1",
    "--set",
    "zero_optimization.stage=0",
    "--set",
    "optimizer.type=NAdam",
)
LIVE: tuple[LiveFault, ...] = tuple(
    LiveFault(LIVE_FAULTS[name], *how)
    for name, how in {
        "healthy": (),
        "loaded machine": ((), "", False, (), True),
        "slowed by 20 ms": (("--fault", "slow", "--ms", "20"),),
        "slowed by 50 ms": (("--fault", "slow", "--ms", "50"),),
        "slowed by 200 ms": (("--fault", "slow", "--ms", "200"),),
        "slow loader": (("--fault", "loader", "--ms", "100"),),
        "slow loaders": (("--fault", "all-loaders", "--ms", "100"),),
        "slow link": ((), "link", True),
        "CPU hogs": ((), "hogs"),
        "stopped": ((), "stop"),
        "GIL held": (("--fault", "spin"),),
        "hangs in data": (("--fault", "sleep"),),
        # Below stage 3 the order of modules does not matter.
        "other order": (("--fault", "order"), "", False, _AT_STAGE_3),
        "killed": ((), "kill"),
        "ends early": (("--fault", "early"),),
        "transfer hangs": ((), "cut", True),
        "cold file": (("--fault", "cold-file"), "limit_memory"),
        "cold weights": (("--fault", "cold-weights"), "limit_memory"),
        # Too little to compute for the update to hide behind.
        "offload waits": (("--fault", "few-rows", "--width", "2048"), "", False, _OFFLOADED),
    }.items()
)


@dataclass
class Seen:
    """What became of one run."""

    seconds: float | None = None
    right: bool = False
    text: str = ""
    others: list[str] = field(default_factory=list)
    """Warnings that were not right, with the time after the fault."""
    changes: int = 0
    """Changes of the verdict from or to bad news, and from one kind or rank of bad news to another."""
    watched_s: float = 0.0
    load: float = 0.0
    """The load average of the last minute at the end."""


def run(live: LiveFault, name: str, pictures: Path | None, record: Path | None = None, calm_s: float = CALM_S) -> Seen:
    """Launch, inject, watch, take a picture, end."""
    at_step = ("--at-step", str(AT_STEP)) if live.script else ()
    command = [sys.executable, "-m", "zerotop", "launch", "benchmarks/verdicts/config.json", "--nproc", "2"]
    command += ["--device", "cpu", "--name", name, "--detach", *live.launch, "--", "benchmarks/verdicts/script.py"]
    command += [*live.script, *at_step]
    environment = dict(os.environ)
    if live.namespace:
        environment["ZEROTOP_SHARED_MEMORY"] = "0"
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if launched.returncode:
        raise SystemExit(f"{name} did not start: {launched.stderr}")
    injection, entry = Injection(), find_any_run(name)
    tape = Tape(entry.sockets) if record is not None else None
    try:
        if live.loaded:
            injection.load()
        if tape is not None:
            tape.begin()
        seen = _watch(live, entry, injection, tape, calm_s if live.fault.calm else VERDICT_S)
        if pictures is not None and seen.right:
            (pictures / f"{live.file_name}.svg").write_text(asyncio.run(picture(entry)), encoding="utf-8")
        if tape is not None and record is not None:
            _record_on(live, entry, tape)
            context = measured_on("benchmarks.verdicts.live", ("torch",))
            context["command"] = f"python -m benchmarks.verdicts.live --only '{live.fault.name}' --record {FOLDER.name}"
            write_recording(record / f"{live.file_name}.jsonl.xz", tape.recording(live.fault.name, FAULTY, context))
        return seen
    finally:
        if tape is not None:
            tape.close()
        injection.end()
        subprocess.run(
            [sys.executable, "-m", "zerotop", "abort", name, "--yes"], cwd=ROOT, capture_output=True, check=False
        )
        injection.end_after_run()


async def picture(entry: RunEntry) -> str:
    """The screen on the run as it is now, as SVG."""
    source = open_source(entry)
    try:
        app = ZerotopApp(source, read_only=True)
        async with app.run_test(size=PICTURE) as pilot:
            deadline = time.monotonic() + 20.0
            while source.state.verdict is None and time.monotonic() < deadline:
                await pilot.pause(0.1)
            await pilot.pause(0.6)  # two ticks of the screen
            return app.export_screenshot(title=f"zerotop attach {entry.name}")
    finally:
        source.close()


def _record_on(live: LiveFault, entry: RunEntry, tape: Tape) -> None:
    """Record until the recording is long enough, or the run has ended."""
    until_s = tape.fault_s + (CALM_RECORDED_S if live.fault.calm else RECORDED_S)
    quiet_since = time.monotonic()
    while tape.now_s < until_s and time.monotonic() - quiet_since < QUIET_S:
        before = tape.now_s
        tape.drain()
        if tape.now_s > before:
            quiet_since = time.monotonic()
        time.sleep(POLL_S)
    status = read_entry(entry.path).status
    if status.state not in LIVE_STATES:
        tape.end(status)


def _watch(live: LiveFault, entry: RunEntry, injection: Injection, tape: Tape | None, limit_s: float) -> Seen:
    source, seen = open_source(entry), Seen()

    def poll() -> None:
        source.poll()
        if tape is not None:
            tape.drain()

    try:
        wait_for(poll, source.wait, lambda: _newest_step(source.state) >= AT_STEP, TRAINS_S)
        pids = [rank.hello.pid for _, rank in sorted(source.state.ranks.items()) if rank.hello is not None]
        if tape is not None:
            tape.mark_fault()
        began = time.monotonic()
        if live.inject:
            getattr(injection, live.inject)(entry, pids)
        # What is said at the start has nothing to do with a fault that begins only now.
        told: Verdict | None = None if live.fault.calm else source.state.verdict
        while time.monotonic() - began < limit_s:
            poll()
            verdict, after = source.state.verdict, time.monotonic() - began
            if verdict is not None and verdict is not told:
                before, told, found = told, verdict, as_finding(verdict)
                changed = before is None or not found.same_as(as_finding(before))
                if changed and before is not None and {before.severity, found.severity} != {"info"}:
                    seen.changes += 1
                right = is_right(found, live.fault, FAULTY)
                if right and not live.fault.calm:
                    return Seen(after, True, verdict.text, seen.others)
                if changed and not right and verdict.severity != "info":
                    seen.others.append(f"{verdict.what} after {after:.0f} s")
            source.wait(POLL_S)
        verdict = source.state.verdict
        seen.text = verdict.text if verdict is not None else ""
        seen.right = live.fault.calm and not seen.others
        seen.watched_s, seen.load = time.monotonic() - began, os.getloadavg()[0]
        return seen
    finally:
        source.close()


def _newest_step(state: RunState) -> int:
    """The step that the rank works on which is furthest: of the faulty one nothing may be heard any more."""
    return max((rank.current_step or 0 for rank in state.ranks.values()), default=0)


def as_finding(verdict: Verdict) -> Finding:
    """The finding that the hub published."""
    return Finding(verdict.what, verdict.text, verdict.severity, tuple(verdict.ranks))  # type: ignore[arg-type]


def wait_for(
    poll: Callable[[], object], wait: Callable[[float], object], reached: Callable[[], bool], limit_s: float
) -> None:
    """Read messages until `reached`, at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"the run has not reached step {AT_STEP} within {limit_s:g} s")
        poll()
        wait(POLL_S)


def report(seen: dict[str, list[Seen]], pipes: bool) -> str:
    """The results as a table, and one verdict of each kind."""
    rows = []
    for name, runs in seen.items():
        took = sorted(one.seconds for one in runs if one.seconds is not None)
        others = sorted({text for one in runs for text in one.others})
        rows.append(
            [
                name,
                f"{sum(one.right for one in runs)}/{len(runs)}",
                f"{statistics.median(took):.1f} s" if took else "",
                f"{took[-1]:.1f} s" if took else "",
                ", ".join(others) or "none",
            ]
        )
    lines = [table(["fault", "right", "median", "worst", "other warnings"], rows, pipes=pipes), ""]
    lines += [f"- {name}: {runs[-1].text}" for name, runs in seen.items()]
    calm = {name: [one for one in runs if one.watched_s] for name, runs in seen.items() if LIVE_FAULTS[name].calm}
    for name, runs in calm.items():
        for one in runs:
            changes = f"{one.changes} change{'' if one.changes == 1 else 's'} of the verdict from or to bad news"
            lines.append(f"- {name}: {changes} in {one.watched_s:.0f} s; load average {one.load:.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", action="append", help="one kind of fault; may be given again")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="keep the messages of the first round's runs")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="save the screen at the first round's verdicts")
    parser.add_argument(
        "--calm-seconds",
        type=float,
        default=CALM_S,
        metavar="S",
        help="how long to watch the runs with which nothing is wrong",
    )
    options = parser.parse_args()
    seen: dict[str, list[Seen]] = {}
    with tempfile.TemporaryDirectory(prefix="zerotop-verdicts-") as home:
        os.environ["XDG_STATE_HOME"] = home
        for number in range(1, options.rounds + 1):
            for live in LIVE:
                name = live.fault.name
                if options.only and name not in options.only:
                    continue
                pictures, record = (options.pictures, options.record) if number == 1 else (None, None)
                one = run(live, f"{live.file_name}-{number}", pictures, record, options.calm_seconds)
                seen.setdefault(name, []).append(one)
                took = f"{one.seconds:.1f} s" if one.seconds is not None else "-"
                print(f"{name}: {'right' if one.right else 'WRONG'} {took}: {one.text} {one.others}", file=sys.stderr)
    print(report(seen, pipes=False))
    if options.markdown:
        context = measured_on("benchmarks.verdicts.live", ("torch", "pyzmq", "psutil"))
        options.markdown.write_text(markdown("Verdicts on real faults", context, report(seen, pipes=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
