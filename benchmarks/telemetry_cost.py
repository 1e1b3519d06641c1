"""What telemetry costs: the same short run with zerotop.telemetry.enabled true and false, in turn, ABBA.

    python -m benchmarks.telemetry_cost --rounds 10 --steps 120

Two figures: the ratio of step times (what a user feels, and as noisy as the machine is), and the CPU time of the
threads that telemetry runs in the ranks (which noise does not touch). README.md says what each includes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks.context import ROOT, markdown, measured_on, table

RANKS = 2
DROPPED_STEPS = 10
"""At the start: caches fill, and `zerotop status` is asked for the ranks' pids."""
SAMPLE_S = 0.25
STEP_LINE = re.compile(r"^(\S+ \S+) \S+ runtime\.train: step (\d+)\b.* · ([\d.]+) ms\b")


class RunFailed(Exception):
    """One line: which run could not be measured, and why."""


@dataclass(frozen=True)
class Sample:
    """CPU seconds so far of the telemetry threads of all ranks, at a wall clock time."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Run:
    """One run's figures, without its first steps."""

    telemetry: bool
    steps: int
    step_ms: float
    """Median, of rank 0."""
    threads_cpu_ms: float
    """CPU milliseconds per step and rank of the telemetry threads."""
    threads_share: float
    """The same as a share of the step time."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="telemetry_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="each is one run with and one without telemetry")
    parser.add_argument("--steps", type=int, default=120, help=f"of every run; the first {DROPPED_STEPS} don't count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, with what it ran on")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    if options.steps < DROPPED_STEPS + 10:
        parser.error(f"--steps: expected {DROPPED_STEPS + 10} or more, got {options.steps}")
    try:
        rounds = [_round(number, options) for number in range(1, options.rounds + 1)]
    except RunFailed as failure:
        print(f"telemetry_cost: {failure}", file=sys.stderr)
        return 1
    figures = _figures(rounds)
    print(_report(rounds, figures, pipes=False))
    context = measured_on("benchmarks.telemetry_cost", ("torch", "pyzmq"))
    if options.json:
        runs = [{"on": asdict(on), "off": asdict(off)} for on, off in rounds]
        options.json.write_text(json.dumps({**context, "figures": figures, "rounds": runs}, indent=1) + "\n")
    if options.markdown:
        body = _report(rounds, figures, pipes=True)
        options.markdown.write_text(markdown(f"Cost of telemetry, {RANKS} ranks on the CPU", context, body))
    return 0


def _round(number: int, options: argparse.Namespace) -> tuple[Run, Run]:
    """(on, off); odd rounds start with on, even ones with off, so that a slow drift cancels out."""
    runs = {}
    for telemetry in (True, False) if number % 2 else (False, True):
        run = runs[telemetry] = _measure(f"telemetry-cost-{os.getpid()}-{number}", telemetry, options.steps)
        print(
            f"round {number}/{options.rounds} telemetry {'on ' if telemetry else 'off'}: {run.step_ms:.1f} ms a step, "
            f"its threads {run.threads_cpu_ms:.2f} ms = {run.threads_share:.2%}",
            file=sys.stderr,
            flush=True,
        )
    return runs[True], runs[False]


# ---- one run ---------------------------------------------------------------------------------------------------------
def _measure(name: str, telemetry: bool, steps: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="zerotop-telemetry-") as state_home:
        environment = {**os.environ, "XDG_STATE_HOME": state_home}
        told = Path(state_home, "launch.txt")
        with told.open("w") as out, _launched(name, telemetry, steps, environment, out) as launcher:
            samples = _watch(name, launcher, environment)
        if launcher.returncode:
            last_line = (told.read_text(errors="replace").strip() or "without a word").splitlines()[-1]
            raise RunFailed(f"{name}: exit code {launcher.returncode}: {last_line}")
        log = Path(state_home, "zerotop", "runs", name, "logs", "1", "rank-0.log").read_text(errors="replace")
    return _run_figures(name, telemetry, log, samples)


@contextlib.contextmanager
def _launched(
    name: str, telemetry: bool, steps: int, environment: dict[str, str], out: TextIO
) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher of a detached run; the run is aborted if the body is left before its end."""
    keys = {
        "train.steps": steps,
        "log.interval": 1,
        "checkpoint.interval": 0,
        "telemetry.enabled": str(telemetry).lower(),
    }
    command = ["launch", "examples/quickstart.json", "--nproc", str(RANKS), "--device", "cpu", "--no-screen"]
    command += ["--name", name, *(word for key, value in keys.items() for word in ("--set", f"zerotop.{key}={value}"))]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "zerotop", *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        start_new_session=True,  # Ctrl-C is this program's to answer
    )
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            _zerotop(["abort", name, "--yes"], environment)
            launcher.wait(timeout=60)


def _watch(name: str, launcher: subprocess.Popen[bytes], environment: dict[str, str]) -> list[Sample]:
    """Sample the telemetry threads from the moment the ranks are known until the run ends."""
    samples: list[Sample] = []
    pids: list[int] = []
    while launcher.poll() is None:
        if len(pids) < RANKS:
            pids = _rank_pids(name, environment)
        else:
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # the ranks end before the launcher
                samples.append(Sample(time.time(), sum(map(_telemetry_threads_cpu_s, pids))))
        time.sleep(SAMPLE_S)
    return samples


def _rank_pids(name: str, environment: dict[str, str]) -> list[int]:
    done = _zerotop(["status", name, "--json"], environment)
    if done.returncode:  # not there yet
        return []
    return [rank["pid"] for rank in json.loads(done.stdout)["ranks"] if rank["pid"]]


def _zerotop(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zerotop", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def _telemetry_threads_cpu_s(pid: int) -> float:
    """CPU seconds so far of a rank's publisher and of ZeroMQ's own threads.

    Before Python 3.14 the kernel does not know the names of Python's threads: all are called like the main one. The
    publisher, and the watch on the supervisor, which sleeps, are those that were started after ZeroMQ's.
    """
    tasks = Path(f"/proc/{pid}/task")
    names = {int(task.name): (task / "comm").read_text().strip() for task in tasks.iterdir()}
    zeromq = {thread for thread, name in names.items() if name.startswith("ZMQbg")}
    python = {
        thread
        for thread, name in names.items()
        if name.startswith("zerotop-") or (zeromq and name == names[pid] and thread > min(zeromq) and thread != pid)
    }
    return sum(_thread_cpu_s(tasks / str(thread)) for thread in zeromq | python)


def _thread_cpu_s(task: Path) -> float:
    nanoseconds = int((task / "schedstat").read_text().split()[0])
    if nanoseconds:
        return nanoseconds / 1e9
    # A kernel without scheduler statistics counts in ticks of about 10 ms. After the name, which may hold blanks and
    # brackets, user and system time are fields 12 and 13.
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run_figures(name: str, telemetry: bool, log: str, samples: list[Sample]) -> Run:
    lines = [match for line in log.splitlines() if (match := STEP_LINE.match(line))]
    counted = [match for match in lines if int(match[2]) > DROPPED_STEPS]
    if len(counted) < 2:
        raise RunFailed(f"{name}: its rank 0 logged {len(lines)} steps")
    step_ms = statistics.median(float(match[3]) for match in counted)
    begin_s, end_s = (
        datetime.datetime.strptime(m[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() for m in counted[:: len(counted) - 1]
    )
    inside = [sample for sample in samples if begin_s <= sample.wall_s <= end_s]
    if len(inside) < 2:
        raise RunFailed(
            f"{name}: its threads were seen {len(inside)} times after step {DROPPED_STEPS}; use more --steps"
        )
    wall_s = inside[-1].wall_s - inside[0].wall_s
    share = (inside[-1].cpu_s - inside[0].cpu_s) / RANKS / wall_s
    return Run(telemetry, len(counted), step_ms, share * (end_s - begin_s) * 1000 / (len(counted) - 1), share)


# ---- what is said about it -------------------------------------------------------------------------------------------
def _figures(rounds: list[tuple[Run, Run]]) -> dict[str, Any]:
    cost = [on.step_ms / off.step_ms - 1 for on, off in rounds]
    return {
        "cost_median": statistics.median(cost),
        "cost_min": min(cost),
        "cost_max": max(cost),
        "threads_on_share": statistics.median(on.threads_share for on, _ in rounds),
        "threads_on_cpu_ms": statistics.median(on.threads_cpu_ms for on, _ in rounds),
        "threads_off_share": statistics.median(off.threads_share for _, off in rounds),
        "threads_off_cpu_ms": statistics.median(off.threads_cpu_ms for _, off in rounds),
    }


def _report(rounds: list[tuple[Run, Run]], figures: dict[str, Any], *, pipes: bool) -> str:
    header = ["round", "step ms on", "step ms off", "on / off - 1", "threads on", "threads off"]
    rows = [
        [
            str(number),
            f"{on.step_ms:.1f}",
            f"{off.step_ms:.1f}",
            f"{on.step_ms / off.step_ms - 1:+.2%}",
            f"{on.threads_share:.3%}",
            f"{off.threads_share:.3%}",
        ]
        for number, (on, off) in enumerate(rounds, 1)
    ]
    told = [
        f"Step time, on against off: {figures['cost_median']:+.2%} (median of {len(rounds)} rounds; "
        f"{figures['cost_min']:+.2%} to {figures['cost_max']:+.2%})",
        f"CPU time of the telemetry threads, per step and rank: {figures['threads_on_cpu_ms']:.2f} ms = "
        f"{figures['threads_on_share']:.3%} of the step (off: {figures['threads_off_cpu_ms']:.2f} ms = "
        f"{figures['threads_off_share']:.3%})",
    ]
    return "\n".join([*(f"- {line}" if pipes else line for line in told), "", table(header, rows, pipes=pipes)])


if __name__ == "__main__":
    sys.exit(main())
