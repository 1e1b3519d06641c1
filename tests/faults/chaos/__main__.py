"""python -m tests.faults.chaos N [--seed S] [--first K]: N faults, and the count of what was resumed and lost. N may be
`each`: every kind of fault once, in the order and with the settings that S gives.

Interrupted, it says at which fault it would go on; --record FILE keeps what was seen.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.chaos import faults
from tests.faults.chaos.checks import Checkpoints, different_losses
from tests.faults.chaos.disk import Disk
from tests.faults.chaos.report import Report
from tests.faults.chaos.run import NotSeen, Run
from tests.faults.chaos.settings import ENVIRONMENT, INTERVAL, STEPS, VARIANTS, write_config
from zerotop.rundir.paths import remove_sockets

ROUND = 10
"""Faults into one run."""
EACH = 0
"""Instead of a number of faults: every kind once."""
Kind = Callable[[faults.Scene], faults.Struck]


class Chaos:
    """All rounds of one call. What goes wrong is collected in `lost` and `orphans`, and said when it is seen."""

    def __init__(self, seed: int, folder: Path, report: Report, kinds: Sequence[Kind] = ()) -> None:
        """kinds: of fault, one after the other; without them each fault draws its own."""
        self.seed, self.folder, self.report, self.kinds = seed, folder, report, kinds
        self.disk = Disk(folder / "checkpoints")
        self.runs: list[Run] = []
        """Of this round."""
        self.checkpoints: dict[str, Checkpoints] = {}
        self.references: dict[int, dict[int, float | None]] = {}
        self.struck = self.resumed = 0
        self.broken = False
        """The run did not do what it must: the next fault has a new one."""
        self.lost: list[str] = []
        self.orphans: list[str] = []
        self.seconds: list[float] = []
        """From a fault to training again, of those that ended it."""

    def reference(self, variant: int, steps: int) -> dict[int, float | None]:
        """The losses of so many undisturbed steps, or more."""
        if len(self.references.get(variant, {})) < steps:
            self.report.say(f"an undisturbed run of {steps} steps with settings {variant}")
            run = Run(f"reference-{variant}-{steps}", write_config(self.folder, variant, None, steps), None)
            try:
                run.until(lambda: not run.live, "the reference's end", 600)
                assert run.status.state == "finished", run.status
                run.until(lambda: not run.processes(), "the end of its processes")
                self.references[variant] = dict(run.losses())
            finally:
                run.close()
        return self.references[variant]

    def round(self, first: int, last: int) -> None:
        """Faults first .. last into one run, or more where one finishes."""
        variant = (self.seed if self.kinds else (first - 1) // ROUND) % len(VARIANTS)
        config = write_config(self.folder, variant, self.disk.folder)
        run, count = None, 0
        for number in range(first, last + 1):
            if run is None or self.broken or not run.live or run.step() > STEPS - 60:
                if run is not None:
                    self.finish(run, variant)
                count, self.broken = count + 1, False
                run = Run(f"chaos-{first}-{count}", config, self.disk.folder)
                self.runs.append(run)
                self.checkpoints[run.name] = Checkpoints(self.disk.folder / run.name)
            self.fault(number, run)
        if run is not None:
            self.finish(run, variant)
        self.runs.clear()

    def close(self) -> None:
        """Interrupted: end what runs."""
        for run in self.runs:
            run.close()
            remove_sockets(run.entry.sockets.folder)
        self.disk.close()

    def fault(self, number: int, run: Run) -> None:
        """One fault into a run that trains."""
        chance = random.Random(f"{self.seed}/{number}")
        checkpoints = self.checkpoints[run.name]
        self.struck += 1
        words = "nothing was done yet"
        try:
            run.train(chance.randint(2, 12))
            run.until(lambda: checkpoints.newest_sound()[0] > 0, "a first checkpoint")
            attempt, step = run.attempt, run.step()
            before = checkpoints.newest_sound()
            began = time.monotonic()
            strike = self.kinds[(number - 1) % len(self.kinds)] if self.kinds else faults.any_of_them
            struck = strike(faults.Scene(run, checkpoints, self.disk, chance))
            words = struck.what
            self.report.kinds[struck.kind] += 1
            if struck.damages:
                before = checkpoints.newest_sound()
            told = self.see_through(run, struck, attempt, checkpoints, before, began)
            self.gather(number, checkpoints.problems())
            self.resumed += 1
            self.report.say(f"{number}: {words}, at step {step} · {told}")
        except (NotSeen, AssertionError) as error:
            self.broken = True
            self.lost.append(f"{number}: {words}: {error}")
            self.report.say(f"{number}: {words} · FAILED: {error}")

    def see_through(
        self,
        run: Run,
        struck: faults.Struck,
        attempt: int,
        checkpoints: Checkpoints,
        before: tuple[int, int],
        began: float,
    ) -> str:
        """What must follow does, and no sound checkpoint from before the fault is passed over. Returns it in words."""
        if struck.follows == "nothing":
            try:
                if struck.silent:  # nobody tells of steps: checkpoints do
                    number = checkpoints.newest_sound()[0]
                    run.until(lambda: checkpoints.newest_sound()[0] > number + 1, "two newer checkpoints")
                else:
                    run.train(INTERVAL + 3)
            finally:
                if struck.undo is not None:
                    struck.undo()
            assert run.attempt == attempt, f"the run was restarted: {run.status.restart_reason}"
        elif struck.follows == "restart":
            run.until(lambda: run.attempt > attempt or not run.live, "a restart")
            assert run.live, f"the run is over: {run.status.reason}"
        else:
            run.until(lambda: not run.live and not run.processes(), "the run's end", 120)
            if struck.saves:
                kept = checkpoints.newest_sound()[1]
                assert (run.status.state, kept) == ("stopped", run.status.step), f"step {kept} is kept: {run.status}"
            run.resume()
        told = "it goes on"
        if struck.follows != "nothing":
            run.train(1, attempt + 1)
            self.seconds.append(time.monotonic() - began)
            assert run.start_step() >= before[1], f"it went on from {run.start_step()}, and {before[1]} was complete"
            told = f"attempt {run.attempt}, from step {run.start_step()}, trains again after {self.seconds[-1]:.1f} s"
        newest = checkpoints.newest_sound()[0]
        run.until(lambda: checkpoints.newest_sound()[0] > newest or not run.live, "a newer checkpoint")
        assert checkpoints.newest_sound()[0] > newest, f"no newer checkpoint: {run.status}"
        self.wait_for_orphans(run)
        return told

    def wait_for_orphans(self, run: Run) -> None:
        try:
            run.until(lambda: not run.orphans(), "no orphans", 20)
        except NotSeen:
            for process in run.orphans():
                self.orphans.append(f"{process.pid}: {' '.join(process.cmdline())[:100]}")
                self.report.say(f"ORPHAN {self.orphans[-1]}")
                process.kill()

    def finish(self, run: Run, variant: int) -> None:
        """The run's own end, and all of its losses."""
        try:
            if run.live:
                run.supervisor().terminate()
            run.until(lambda: not run.live, "the run's end", 300)
            self.wait_for_orphans(run)
            wrong = different_losses(run, self.reference(variant, max((step for step, _ in run.losses()), default=1)))
            self.gather(0, [f"{run.name}: {text}" for text in wrong])
            steps = len(run.losses())
            self.report.say(f"{run.name} ended: {run.status.state} at step {run.status.step}; {steps} losses compared")
        except (NotSeen, AssertionError) as error:
            self.lost.append(f"{run.name}: {error}")
        finally:
            run.close()
            shutil.rmtree(self.disk.folder / run.name, ignore_errors=True)
            remove_sockets(run.entry.sockets.folder)

    def gather(self, number: int, problems: list[str]) -> None:
        for problem in problems:
            self.lost.append(f"{number}: {problem}")
            self.report.say(f"LOST {problem}")


def _count(text: str) -> int:
    return EACH if text == "each" else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("faults", type=_count, metavar="N", help="how many, or `each`: every kind once")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what happens and when (not of how fast this machine is)"
    )
    parser.add_argument("--first", type=int, default=1, help="go on at this fault; the count is of this call")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was struck and seen here, as Markdown")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # what was started and mounted goes, also under nohup
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="zerotop-chaos-") as name:
        folder = Path(name)
        os.environ |= {**ENVIRONMENT, "XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache")}
        report = Report()
        kinds = faults.each(options.seed) if options.faults == EACH else ()
        chaos = Chaos(options.seed, folder, report, kinds)
        try:
            at, end = options.first, options.first + (len(kinds) or options.faults) - 1
            while at <= end:
                last = min(end, (at - 1) // ROUND * ROUND + ROUND)
                chaos.round(at, last)
                at = last + 1
        except KeyboardInterrupt:
            report.say(f"interrupted; --first {options.first + chaos.struck - 1} goes on")
            chaos.struck -= chaos.struck > chaos.resumed + len(chaos.lost)  # the one under way
        finally:
            chaos.close()
    if chaos.seconds:
        times = sorted(chaos.seconds)
        report.say(f"from a fault to training again: median {times[len(times) // 2]:.1f} s, most {times[-1]:.1f} s")
    report.end(
        [*chaos.lost, *chaos.orphans],
        f"{chaos.struck} faults, {chaos.resumed} resumed, {len(chaos.lost)} lost, {len(chaos.orphans)} orphans",
    )
    if options.record:
        report.write(options.record)
    return 0 if chaos.resumed == chaos.struck and not chaos.lost and not chaos.orphans else 1


if __name__ == "__main__":
    sys.exit(main())
