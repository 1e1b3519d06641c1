"""What watching another trainer costs, in paired runs.

    python -m benchmarks.watching.cost --rounds 5 --steps 60

Step: the script's own step times under `zerotop run`, with watch() against without, in turn (ABBA). Other programs
disturb that more than watching does, so there is also what they don't disturb: the CPU time of the telemetry threads of
rank 0 a step, and that of its training thread in what watch() has it call. Start: `zerotop run
-- python -c pass` against `python -c pass`, wall time. Attach: from opening a screen's source on a live run to a state
with all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.context import markdown, measured_on, table

DROPPED = 10
SCRIPT = Path(__file__).with_name("script.py")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="watching.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help=f"of every run; the first {DROPPED} don't count")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here, with what it ran on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zerotop-watching-") as folder:
        os.environ["XDG_STATE_HOME"] = folder
        steps = [_round(number, options.steps, Path(folder)) for number in range(options.rounds)]
        starts = [_start() for _ in range(options.rounds)]
        attaches = _attach(options.rounds, Path(folder))
    report = _report(steps, starts, attaches)
    print(report)
    if options.markdown:
        context = measured_on("benchmarks.watching.cost", ("torch", "pyzmq"))
        options.markdown.write_text(markdown("Cost of watching another trainer, two ranks on the CPU", context, report))
    return 0


class Steps(NamedTuple):
    """A run in ms a step: medians, and means of what does not happen in every step."""

    step: float
    cpu: float
    threads: float
    """CPU time of the telemetry threads."""
    calls: float
    """CPU time of the training thread in what watch() has it call."""

    @property
    def own(self) -> float:
        """What watching takes, as a share of the step."""
        return (self.threads + self.calls) / self.step


def _round(number: int, steps: int, folder: Path) -> tuple[Steps, Steps]:
    """A run with watch(), and one without."""
    found = {}
    for watched in (True, False) if number % 2 else (False, True):
        one = found[watched] = _steps(watched, steps, folder)
        words = f"with watch(), which took {one.own:.2%}" if watched else "without watch()"
        print(f"round {number + 1}: {one.step:.1f} ms a step, {one.cpu:.2f} of CPU, {words}", file=sys.stderr)
    return found[True], found[False]


def _steps(watched: bool, steps: int, folder: Path) -> Steps:
    out = folder / "times.json"
    environment = {**os.environ, "WATCH": str(int(watched)), "STEPS": str(steps), "OUT": str(out)}
    words = [*_zerotop("run", "--nproc", "2", "--no-screen"), str(SCRIPT)]
    ended = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(f"the run failed with exit code {ended.returncode}; its last output:\n{ended.stdout[-4000:]}")
    step, cpu, threads, calls = zip(*json.loads(out.read_text())[DROPPED:], strict=True)
    return Steps(statistics.median(step), statistics.median(cpu), statistics.mean(threads), statistics.mean(calls))


def _start() -> tuple[float, float]:
    """Seconds of a command that does nothing, wrapped and bare."""
    bare = [sys.executable, "-c", "pass"]
    return _seconds([*_zerotop("run", "--no-screen"), "--", *bare]), _seconds(bare)


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def _attach(rounds: int, folder: Path) -> list[float]:
    """Milliseconds to the full picture of a live run."""
    from zerotop.rundir.directory import find_run
    from zerotop.source.opening import open_source

    environment = {**os.environ, "WATCH": "1", "STEPS": "100000", "OUT": str(folder / "times.json")}
    start = [*_zerotop("run", "--nproc", "2", "--name", "attach", "--detach"), str(SCRIPT)]
    subprocess.run(start, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    entry = find_run("attach")
    taken: list[float] = []
    try:
        for number in range(rounds + 1):
            began, source = time.perf_counter(), open_source(entry)
            deadline = began + 60
            while time.perf_counter() < deadline:
                source.poll()
                ranks = source.state.ranks.values()
                if len(ranks) == 2 and all(r.step and r.memory and r.heartbeat for r in ranks):
                    break
                source.wait(0.05)
            if number:  # the first one waits for the ranks' start
                taken.append(1e3 * (time.perf_counter() - began))
            source.close()
    finally:
        subprocess.run(_zerotop("abort", "attach", "--yes"), check=True, capture_output=True)
    return taken


def _zerotop(*words: str) -> list[str]:
    return [sys.executable, "-m", "zerotop", *words]


def _report(steps: list[tuple[Steps, Steps]], starts: list[tuple[float, float]], attaches: list[float]) -> str:
    ratios = [on.step / off.step - 1 for on, off in steps]
    cpu = [on.cpu / off.cpu - 1 for on, off in steps]
    threads, calls, own = (
        statistics.median(which) for which in zip(*((on.threads, on.calls, on.own) for on, _ in steps), strict=True)
    )
    extra = [wrapped - bare for wrapped, bare in starts]
    lines = [
        f"- Step time, with watch() against without: {statistics.median(ratios):+.2%} (median of {len(ratios)} rounds; "
        f"{min(ratios):+.2%} to {max(ratios):+.2%})",
        f"- CPU time of a step, likewise: {statistics.median(cpu):+.2%} ({min(cpu):+.2%} to {max(cpu):+.2%})",
        f"- What watching itself takes of a step: {own:.2%}, {threads:.2f} ms of CPU time in the telemetry threads and "
        f"{calls:.2f} ms in what it has the training thread call (medians)",
        f"- Start: {statistics.median(extra):.2f} s more than the bare command (median of {len(extra)})",
        f"- Attach to the full picture: {statistics.median(attaches):.0f} ms (median of {len(attaches)})",
        "",
        table(
            ["round", "ms with", "ms without", "ratio - 1", "CPU ms with", "CPU ms without", "ratio - 1", "own share"],
            [
                [str(number), *_cells(on.step, off.step), *_cells(on.cpu, off.cpu), f"{on.own:.2%}"]
                for number, (on, off) in enumerate(steps, start=1)
            ],
            pipes=True,
        ),
    ]
    return "\n".join(lines)


def _cells(on_ms: float, off_ms: float) -> list[str]:
    return [f"{on_ms:.1f}", f"{off_ms:.1f}", f"{on_ms / off_ms - 1:+.2%}"]


if __name__ == "__main__":
    sys.exit(main())
