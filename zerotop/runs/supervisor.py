"""The supervisor of a run on one node: it starts the ranks, keeps the hub, and lets nothing of the run outlive it.

python -P -m zerotop.runs.supervisor RUN [--resume] [--ready-fd N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from runtime.config import Resolved
from runtime.wire.messages import Command, Event, LogRecord, RunStatus, StepResult
from runtime.wire.rundir import RunFile, boot_id, read_run, read_status, write_json
from zerotop.hub.hub import Hub
from zerotop.hub.recorder import Recorder, earlier_steps
from zerotop.probe.host import HostProbe
from zerotop.probe.nvml import GpuProbe
from zerotop.runs import torchrun
from zerotop.runs.hang import HangWatch
from zerotop.runs.logs import cap_logs
from zerotop.runs.outcome import Evidence, Outcome, decide, tail
from zerotop.runs.paths import RunError, lock_sockets, remove_sockets
from zerotop.runs.processes import become_subreaper, descendants, detach, kill_descendants, reap, send
from zerotop.runs.stacks_report import StackTaker

STOP_DEADLINE_VARIABLE = "ZEROTOP_STOP_DEADLINE_S"
STOP_DEADLINE_S = 60.0
"""After SIGTERM or SIGUSR1 (a batch system's warning), the run has so long to stop after a checkpoint; then it is
aborted."""
TERM_PATIENCE_S = 5.0
LAST_WORDS_S = 2.0
CAP_INTERVAL_S = 10.0


class Supervisor:
    def __init__(self, path: Path, run: RunFile, *, resume: bool) -> None:
        self.path = path
        self.logs = path / "logs" / str(run.attempt)
        self._resume = resume
        me = psutil.Process()
        self.run_file = run.model_copy(
            update={"supervisor_pid": me.pid, "supervisor_start": me.create_time(), "boot_id": boot_id()}
        )
        self._abort_reason: str | None = None
        self._failure: str | None = None
        self._end_asked = asyncio.Event()
        self._exit_codes: dict[int, int] = {}
        self._rank_codes: dict[int, int] = {}
        self._launcher: subprocess.Popen[bytes] | None = None
        self._launcher_ended = asyncio.Event()
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._tasks: list[asyncio.Task[None]] = []

    async def supervise(self, ready: Ready) -> Outcome:
        """One attempt from start to end. Raises RunError when it can't start."""
        loop = asyncio.get_running_loop()
        lock = lock_sockets(Path(self.run_file.sockets))
        recorder = Recorder(self.path / "recording.sqlite", self.run_file.attempt)
        hub = self.hub = Hub(
            self.run_file,
            self._first_status(),
            recorder=recorder,
            abort=self._abort_command,
            stacks=self._stacks_command,
            on_status=self._write_status,
            earlier=self._earlier_steps(),
        )
        self._taker = StackTaker(self.path, self.run_file.nproc, hub)
        write_json(self.path / "run.json", self.run_file)
        gpus = GpuProbe()
        try:
            hub.start()
            loop.add_signal_handler(signal.SIGCHLD, self._collect)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                loop.add_signal_handler(number, self._stop_by_signal, number)
            self._start_launcher(lock)
            ready.say_up()
            gpus.start()
            self._announce()
            self._tasks = [
                loop.create_task(self._reported("the probe", self._probe(gpus))),
                loop.create_task(self._reported("the cap on logs", self._cap_logs())),
                loop.create_task(self._reported("the watch for hangs", self._watch_for_hangs())),
            ]
            await self._until_over()
            outcome = await self._finish()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            loop.remove_signal_handler(signal.SIGCHLD)
            kill_descendants()
            recorder.close()
            gpus.close()
            await hub.close()
            self._disk.shutdown()
            remove_sockets(Path(self.run_file.sockets))
            os.close(lock)
        return outcome

    # ---- starting --------------------------------------------------------------------------------------------------
    def _first_status(self) -> RunStatus:
        status = read_status(self.path)
        return status.model_copy(
            update={"attempt": self.run_file.attempt, "started_wall_s": status.started_wall_s or time.time()}
        )

    def _earlier_steps(self) -> list[StepResult]:
        """Steps of the attempts before, up to the checkpoint that this one goes on from: later ones never happened."""
        last = self._first_status().step
        return [result for result in earlier_steps(self.path, self.run_file.attempt) if result.step <= last]

    def _start_launcher(self, lock: int) -> None:
        """Start torchrun, or what run.json gives in its place.

        It inherits the lock on the sockets folder, where its rendezvous lies too: if this supervisor is killed, nobody
        sweeps that folder away before torchrun has ended.
        """
        command = self.run_file.command or torchrun.command(self.run_file, self.path)
        variables = torchrun.environment(self.run_file, self.path, supervisor_pid=os.getpid(), resume=self._resume)
        with (self.logs / "torchrun.log").open("ab") as log:
            try:
                self._launcher = subprocess.Popen(
                    command,
                    env=variables,
                    cwd=self.run_file.working_folder or None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            except OSError as error:
                raise RunError(f"can't start the ranks: {command[0]}: {error.strerror}") from None
        if self._launcher.pid in self._exit_codes:  # it ended before we knew its number
            self._launcher_ended.set()

    def _announce(self) -> None:
        """What launch found out, for the event pane: defaults chosen, keys without effect, what a resume changed."""
        try:
            notes = json.loads((self.logs / "notes.json").read_text())["notes"]
        except FileNotFoundError:
            return
        now = time.time()
        self.hub.say(*(Event(rank=None, what=note["what"], text=note["text"], wall_s=now) for note in notes))

    # ---- while it runs ---------------------------------------------------------------------------------------------
    def _collect(self) -> None:
        """Our child torchrun has ended, or an orphan of its that we adopted."""
        self._exit_codes |= reap()
        if self._launcher and self._launcher.pid in self._exit_codes:
            self._launcher.returncode = self._exit_codes[self._launcher.pid]
            self._launcher_ended.set()

    def _stop_by_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        self.hub.command(Command(id=uuid.uuid4().hex, name="stop", who=name))
        deadline_s = _stop_deadline_s()
        self.hub.event(
            "signal", f"{name}: the run stops after a checkpoint, or is aborted in {deadline_s:g} s", "warning"
        )
        asyncio.get_running_loop().call_later(
            deadline_s, self._abort, f"{name}: it did not stop within {deadline_s:g} s"
        )

    def _abort_command(self, command: Command) -> None:
        self._abort(f"aborted by {command.who}" if command.who else "aborted on request")

    def _stacks_command(self, command: Command) -> None:
        work = self._reported("taking the stacks", self._taker.answer(command))
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _abort(self, reason: str) -> None:
        if self._abort_reason is None and not self._launcher_ended.is_set():
            self._abort_reason = reason
            self._end_asked.set()

    def end_attempt(self, reason: str) -> None:
        """End the ranks that run now: they have failed for `reason` (one line for people) and can't say so themselves,
        because they hang. Call it in the event loop. Does nothing once they have ended, or are being ended."""
        if self._failure is None and self._abort_reason is None and not self._launcher_ended.is_set():
            self._failure = reason
            self._end_asked.set()

    async def _reported(self, name: str, work: Awaitable[None]) -> None:
        """A chore that fails is told and left; the run goes on without it."""
        try:
            await work
        except Exception as error:
            traceback.print_exc()
            self.hub.complain(f"{name} failed: {type(error).__name__}: {error}")

    async def _probe(self, gpus: GpuProbe) -> None:
        host = HostProbe()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="probe") as thread:
            while True:
                pids = {
                    rank: state.hello.pid
                    for rank, state in self.hub.state.ranks.items()
                    if state.hello and not state.goodbye
                }
                stats = await loop.run_in_executor(thread, host.sample, pids, *gpus.latest())
                self.hub.say(stats, source=f"probe/{stats.host}")
                await asyncio.sleep(1.0)

    async def _watch_for_hangs(self) -> None:
        resolved = Resolved.from_json((self.path / "resolved.json").read_bytes())
        ends = self.end_attempt if resolved.zerotop.restarts.on_hang else None
        await HangWatch(self.hub, self._taker, ends).watch()

    async def _cap_logs(self) -> None:
        while True:
            await asyncio.sleep(CAP_INTERVAL_S)
            for path in await asyncio.get_running_loop().run_in_executor(self._disk, cap_logs, self.logs):
                self.hub.event(
                    "log", f"{path.name} was full and starts anew; its end is kept in {path.name}.1", "warning"
                )

    def _write_status(self, status: RunStatus) -> None:
        self._disk.submit(self._write_status_now, status)

    def _write_status_now(self, status: RunStatus) -> None:
        try:
            write_json(self.path / "state.json", status)
        except OSError as error:
            print(f"can't write state.json: {error}", file=sys.stderr, flush=True)

    # ---- ending ----------------------------------------------------------------------------------------------------
    async def _until_over(self) -> None:
        """Until torchrun has ended by itself, or an abort or `end_attempt` has ended every process."""
        ended = asyncio.create_task(self._launcher_ended.wait())
        asked = asyncio.create_task(self._end_asked.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, asked):
            task.cancel()
        if not self._end_asked.is_set():
            await self._hear_last_words()
        # What ends from here on ends by our hand, and says nothing about the cause.
        self._rank_codes = self._rank_exit_codes()
        await self._end_processes()

    async def _hear_last_words(self) -> None:
        """The ranks are gone; their goodbyes may still be on their way. After a failure not for long: a killed rank
        says nothing."""
        failed = self._launcher is not None and self._launcher.returncode != 0
        short = failed or self._silent_script()
        deadline = time.monotonic() + (LAST_WORDS_S / 4 if short else LAST_WORDS_S)
        ranks = self.hub.state.ranks.values()
        while time.monotonic() < deadline and (
            any(state.hello and not state.goodbye for state in ranks) or self._silent_script()
        ):
            await asyncio.sleep(0.02)

    def _silent_script(self) -> bool:
        """Whether a script runs here, and no rank has said hello: only `initialize` makes it speak."""
        return bool(self.run_file.script) and not any(state.hello for state in self.hub.state.ranks.values())

    async def _end_processes(self) -> None:
        """TERM, some patience, KILL: for descendants only, whoever their parent is by now."""
        left = descendants()
        send(left, signal.SIGTERM)
        deadline = time.monotonic() + TERM_PATIENCE_S
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            self._collect()
            left = descendants()
        self._collect()
        stuck = kill_descendants()
        if stuck:
            self.hub.event(
                "exit", f"{stuck} processes can't be killed: they hang in the kernel (a wedged driver?)", "error"
            )

    async def _finish(self) -> Outcome:
        """Decide how it ended, and tell: the open commands' askers, the screens, state.json."""
        state = self.hub.state
        outcome = decide(
            Evidence(
                nproc=self.run_file.nproc,
                launcher_exit=self._launcher.returncode if self._launcher else None,
                logs=self.logs,
                goodbyes={rank: rank_state.goodbye for rank, rank_state in state.ranks.items() if rank_state.goodbye},
                exit_codes=self._rank_codes,
                stopping=self.hub.status.state == "stopping",
                abort_reason=self._abort_reason,
                failure=self._failure,
                steps={rank: rank_state.step.step for rank, rank_state in state.ranks.items() if rank_state.step},
                silent_script=self._silent_script(),
            )
        )
        good = outcome.state in ("finished", "stopped")
        # Telemetry may have lost the last step; a goodbye on a good end knows it.
        step = max([state.step, *(rank.goodbye.step for rank in state.ranks.values() if rank.goodbye and good)])
        self.hub.router.finish(outcome.state, step)
        if outcome.error:
            self.hub.say(
                LogRecord(
                    rank=outcome.failed_rank,
                    level="error",
                    logger="zerotop.supervisor",
                    text=outcome.error,
                    wall_s=time.time(),
                )
            )
        self.hub.event("exit", f"{outcome.state}: {outcome.reason}", "info" if good else "error")
        end: dict[str, Any] = {
            "state": outcome.state,
            "reason": outcome.reason,
            "step": step,
            "exit_code": outcome.exit_code,
            "failed_rank": outcome.failed_rank,
            "error": outcome.error,
            "ended_wall_s": time.time(),
        }
        # On disk first: whoever learns of the end from a screen finds it in the directory too.
        status = self.hub.status.model_copy(update=end)
        await asyncio.get_running_loop().run_in_executor(self._disk, self._write_status_now, status)
        self.hub.set_status(**end)
        return outcome

    def _rank_exit_codes(self) -> dict[int, int]:
        """Of ranks that we adopted because torchrun died before them."""
        ranks = {state.hello.pid: rank for rank, state in self.hub.state.ranks.items() if state.hello}
        return {ranks[pid]: code for pid, code in self._exit_codes.items() if pid in ranks}


class Ready:
    """One JSON line to whoever waits for the supervisor to be up: {"up": true} or {"error": "..."}."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def say_up(self) -> None:
        self._say({"up": True})

    def say_error(self, text: str) -> None:
        with contextlib.suppress(RunError):  # nobody waits: state.json and supervisor.log tell it
            self._say({"error": text})

    def _say(self, message: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.write(descriptor, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise RunError("the launch was interrupted: nobody waits any more for this supervisor to be up") from None
        finally:
            os.close(descriptor)


def _stop_deadline_s() -> float:
    try:
        return max(0.0, float(os.environ[STOP_DEADLINE_VARIABLE]))
    except (KeyError, ValueError):
        return STOP_DEADLINE_S


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zerotop.runs.supervisor", description="Supervise one run; started by zerotop launch."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument("--ready-fd", type=int, help="file descriptor to write to when it is up, or can't be")
    arguments = parser.parse_args()
    os.umask(0o077)  # sockets, logs and the recording are the user's alone
    ready = Ready(arguments.ready_fd)
    run = read_run(arguments.run)
    detach(str(arguments.run / "logs" / str(run.attempt) / "supervisor.log"))
    become_subreaper()
    try:
        outcome = asyncio.run(_supervise(arguments.run, run, arguments.resume, ready))
    except RunError as error:
        _fail(arguments.run, str(error), "")
        ready.say_error(str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        kill_descendants()
        _fail(
            arguments.run,
            f"the supervisor failed: {error}",
            tail(arguments.run / "logs" / str(run.attempt) / "supervisor.log"),
        )
        ready.say_error(f"the supervisor failed: {type(error).__name__}: {error}")
        return 1
    return 0 if outcome.state in ("finished", "stopped") else 1


async def _supervise(path: Path, run: RunFile, resume: bool, ready: Ready) -> Outcome:
    return await Supervisor(path, run, resume=resume).supervise(ready)


def _fail(path: Path, reason: str, error: str) -> None:
    """state.json for a supervisor that can't go on. An interrupted launch has removed its directory already."""
    if not path.exists():
        return
    status = read_status(path)
    write_json(
        path / "state.json",
        status.model_copy(update={"state": "failed", "reason": reason, "error": error, "ended_wall_s": time.time()}),
    )


if __name__ == "__main__":
    sys.exit(main())
