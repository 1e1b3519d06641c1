"""A run under fire: its processes, what it says of itself, and going on after its supervisor is gone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from runtime.wire.messages import LIVE_STATES, RunStatus, StepResult
from tests.harness.runs import lives
from tests.harness.waiting import patient, until
from zerotop.hub.recorder import read_messages
from zerotop.launch.start import start_run
from zerotop.rundir.directory import read_entry
from zerotop.source.live import LiveSource

WRITER = "runtime.checkpoint.saving.writer"
DEADLINE_S = 90.0


class NotSeen(AssertionError):
    """What should have happened has not."""


class Run:
    """One run, through all of its attempts and supervisors."""

    def __init__(self, name: str, config: Path, checkpoints: Path | None, nproc: int = 2) -> None:
        self.name, self.checkpoints, self.nproc = name, checkpoints / name if checkpoints else None, nproc
        self.entry = start_run(config, nproc=nproc, device="cpu", name=name)
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        """Every process that the run ever had, by pid and start time."""
        self.source = self._open()

    @property
    def path(self) -> Path:
        return self.entry.path

    def _open(self) -> LiveSource:
        source = LiveSource(self.entry.sockets, self.path, lambda: read_entry(self.path).status)
        source.start()
        return source

    def resume(self) -> None:
        """`zerotop launch --resume --name NAME`, which finds the config in the run."""
        self.source.close()
        self.entry = start_run(None, name=self.name, resume=True)
        self.source = self._open()

    # ---- what it is ----------------------------------------------------------------------------------------------
    @property
    def status(self) -> RunStatus:
        return read_entry(self.path).status

    @property
    def live(self) -> bool:
        return self.status.state in LIVE_STATES

    @property
    def attempt(self) -> int:
        return read_entry(self.path).run.attempt

    def step(self) -> int:
        """The last step that all ranks of the newest attempt have finished; its start where there is none."""
        state = self.source.state
        done = [rank.step.step for rank in state.ranks.values() if rank.step]
        return min(done) if len(done) == self.nproc else self.start_step()

    def start_step(self) -> int:
        hello = self.source.state.hello
        return hello.start_step if hello else 0

    def until(self, condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        def look() -> bool:
            self.source.poll()
            self.processes()
            return condition()

        until(look, lambda: f"{what}; {self.status}", deadline_s, pause=self.source.wait, error=NotSeen)

    def train(self, steps: int, attempt: int | None = None) -> None:
        """Until so many more steps are done, or those left of the run; in `attempt` or a later one."""

        def begun() -> bool:
            hello = self.source.state.hello
            return bool(hello and hello.attempt >= (attempt or 0) and len(self.source.state.ranks) == self.nproc)

        self.until(lambda: begun() or not self.live, "all ranks")
        goal = self.step() + steps
        self.until(lambda: self.step() >= goal or not self.live, f"step {goal}")

    # ---- its processes -------------------------------------------------------------------------------------------
    def supervisor(self) -> psutil.Process:
        return psutil.Process(read_entry(self.path).run.supervisor_pid)

    def processes(self) -> list[psutil.Process]:
        """All of them that live, now and from earlier on."""
        try:
            supervisor = self.supervisor()
            for process in (supervisor, *supervisor.children(recursive=True)):
                self.seen.setdefault((process.pid, process.create_time()), process)
        except psutil.Error:
            pass  # it is gone; what it had is known already
        return [process for process in self.seen.values() if lives(process)]

    def ranks(self) -> dict[int, psutil.Process]:
        return {
            number: psutil.Process(rank.hello.pid) for number, rank in self.source.state.ranks.items() if rank.hello
        }

    def torchrun(self) -> psutil.Process:
        return next(p for p in self.processes() if "torch.distributed.run" in " ".join(command_of(p)))

    def writers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if WRITER in command_of(process)]

    def orphans(self) -> list[psutil.Process]:
        """Processes that outlive the run, or the attempt that they belong to."""
        if not self.live:
            return self.processes()
        supervisor = self.supervisor()
        family = {p.pid for p in supervisor.children(recursive=True)} | {supervisor.pid}
        return [process for process in self.processes() if process.pid not in family]

    def close(self) -> None:
        """End whatever is left of it."""
        self.source.close()
        for process in self.processes():
            process.kill()
        psutil.wait_procs(list(self.seen.values()), timeout=patient(5))

    def losses(self) -> list[tuple[int, float | None]]:
        """(step, loss) of every step of every attempt, as recorded."""
        return [(m.step, m.loss) for m in read_messages(self.path) if isinstance(m, StepResult) and m.rank == 0]


class Screen:
    """`zerotop attach` in a terminal of its own."""

    def __init__(self, run: Run) -> None:
        ours, theirs = os.openpty()
        self._terminal = ours
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zerotop", "attach", run.name],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(ours, False)
        drawn = 0

        def draws() -> bool:
            nonlocal drawn
            try:
                drawn += len(os.read(ours, 1 << 16))
            except BlockingIOError:
                return drawn > 2000
            return drawn > 2000

        run.until(draws, "a screen")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def inside_a_write(run: Run, chance: random.Random, *, rename: bool) -> bool:
    """Return while a checkpoint is being written (or is about to be renamed). False when none was seen in time."""
    assert run.checkpoints is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for partial in run.checkpoints.glob(".step-*.partial"):
            if not rename or (partial / "manifest.json").exists():
                time.sleep(chance.uniform(0, 0.002 if rename else 0.15))
                return True
        time.sleep(0.0005)
        run.source.poll()
        if not run.live:
            return False
    return False
