"""The supervisor of a run on one node: it starts the ranks, runs the hub, and lets no process of the run outlive it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from runtime.config import Resolved
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import Command, Event, Hello, LogRecord, RunStatus, StepResult
from runtime.wire.rundir import RunFile, boot_id, read_status, write_json
from zerotop.alerts.watch import AlertWatch
from zerotop.diagnose.evidence import FailureEvidence
from zerotop.diagnose.gpu_alarms import GpuAlarms
from zerotop.diagnose.hang import HangWatch
from zerotop.diagnose.memorywatch import MemoryWatch
from zerotop.diagnose.outcome import Outcome, decide
from zerotop.diagnose.stacks_report import StackTaker
from zerotop.diagnose.verdicts import VerdictWatch
from zerotop.hub.hub import Hub
from zerotop.hub.recorder import Recorder, earlier_evaluations, earlier_steps
from zerotop.launch.handshake import Ready
from zerotop.probe.nvml import GpuProbe
from zerotop.rundir.paths import RunError, lock_sockets, make_private_folder, remove_sockets
from zerotop.rundir.statusfile import StatusFile
from zerotop.supervise.attempt import Attempt
from zerotop.supervise.background import BackgroundTasks
from zerotop.supervise.batchsignal import stop_by_signal
from zerotop.supervise.folderwatch import FolderWatch
from zerotop.supervise.outputs import Outputs
from zerotop.supervise.processes import descendants, kill_descendants, reap, send
from zerotop.supervise.profiles import ProfileCollector
from zerotop.supervise.restarts import Failure, Restarts
from zerotop.supervise.startwatch import StartWatch
from zerotop.supervise.stopping import StopWatch

TERM_PATIENCE_S = 5.0
DEATH_PATIENCE_S = 3.0
"""How long torchrun may take to end the other ranks after the death of one, and to log what it saw."""
LAUNCHER_PATIENCE_S = 1.0
"""How long torchrun may take to end after its ranks."""
LAST_WORDS_S = 2.0
"""How long to wait for goodbyes that are still on their way."""


class Supervisor:
    """Runs one run from start to end. `lock` is the descriptor that holds the run's lock (rundir/lock.py)."""

    def __init__(self, path: Path, run: RunFile, *, resume: bool, lock: int) -> None:
        self.path = path
        self._resume = resume
        self._lock = lock
        me = psutil.Process()
        self.run_file = run.model_copy(
            update={"supervisor_pid": me.pid, "supervisor_start": me.create_time(), "boot_id": boot_id()}
        )
        self._settings = Resolved.from_json((path / "resolved.json").read_bytes()).zerotop
        self._restarts = Restarts(self._settings.restarts)
        self._attempt = Attempt(self.run_file, path)
        self._abort_reason: str | None = None
        self._restart_text = ""
        """Reason of the newest restart, until its ranks have reported the step from which they continue."""
        self._reached = 0
        """The last step of the previous attempt."""
        self._stuck = 0
        self._status_file = StatusFile(path)

    @property
    def logs(self) -> Path:
        """The log folder of the current attempt."""
        return self._attempt.logs

    async def supervise(self, ready: Ready) -> Outcome:
        """Run all attempts and return how the last one ended. Raises RunError if the run cannot start."""
        loop = asyncio.get_running_loop()
        locks = (lock_sockets(Path(self.run_file.sockets)), self._lock)
        recorder = Recorder(self.path / "recording.sqlite", self.run_file.attempt)
        hub = self.hub = Hub(
            self.run_file,
            self._first_status(),
            recorder=recorder,
            abort=self._abort_command,
            stacks=self._stacks_command,
            on_stop=self._begin_stop,
            on_status=self._status_file.write,
            on_hello=self._meet,
            on_event=lambda event: self._profiles.hear(event),
            earlier=self._earlier(),
        )
        self._profiles = ProfileCollector(self.path, hub)
        self._outputs = Outputs(self.path, self.run_file, hub, self._settings)
        self._taker = StackTaker(self.path, self.run_file.nproc, hub)
        self._stop_watch = StopWatch(hub, self._taker, self._abort)
        self._start_watch = StartWatch(hub, Path(self.run_file.sockets))
        write_json(self.path / "run.json", self.run_file)
        gpus = GpuProbe()
        chores = self._background = BackgroundTasks(hub, lambda: self._attempt, gpus, self._status_file.disk)
        try:
            hub.start()
            loop.add_signal_handler(signal.SIGCHLD, self._collect)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                loop.add_signal_handler(number, self._stop_by_signal, number)
            self._attempt.start(resume=self._resume, keep=locks)
            ready.say_up()
            gpus.start()
            self._announce()
            if self.run_file.wrapped:  # it runs; whether its ranks will report, only they know
                self.hub.set_status(state="running")
            chores.start()
            chores.add("the watch on the start", self._start_watch.watch())
            chores.add("the watch for hangs", self._watch_for_hangs())
            self._verdicts = VerdictWatch(hub)
            chores.add("the verdict", self._verdicts.watch())
            chores.add("the process of the outputs", self._outputs.watch())
            chores.add("the alerts", AlertWatch(hub, self._settings.alerts).watch())
            chores.add("the watch on the GPUs", GpuAlarms(hub).watch())
            chores.add("the watch on memory", MemoryWatch(hub).watch())
            folder = FolderWatch(self.path, hub, lambda: self.run_file)
            chores.add("the watch on the run directory", folder.watch())
            chores.add("the merge of profiles", self._profiles.watch())
            outcome = await self._attempts(locks)
            await self._profiles.finish()
            await self._finish(outcome)
            await self._outputs.finish()
        finally:
            self._stop_watch.close()
            await chores.close()
            loop.remove_signal_handler(signal.SIGCHLD)
            kill_descendants()
            recorder.close()
            gpus.close()
            await hub.close()
            self._status_file.close()
            remove_sockets(Path(self.run_file.sockets))
            for lock in locks:
                os.close(lock)
        return outcome

    # ---- starting --------------------------------------------------------------------------------------------------
    def _first_status(self) -> RunStatus:
        status = read_status(self.path)
        return status.model_copy(
            update={"attempt": self.run_file.attempt, "started_wall_s": status.started_wall_s or time.time()}
        )

    def _earlier(self) -> list[StepResult | Evaluation]:
        """Steps and evaluations of previous attempts up to the checkpoint from which this one continues; later ones
        are replayed."""
        last, attempt = self._first_status().step, self.run_file.attempt
        past: list[StepResult | Evaluation] = [
            *earlier_steps(self.path, attempt),
            *earlier_evaluations(self.path, attempt),
        ]
        return [result for result in past if result.step <= last]

    def _announce(self) -> None:
        """The notes of launch as events: defaults chosen, keys without effect, what a resume changed."""
        if warning := self._attempt.collector.warning():
            self.hub.event("memory", warning, "warning")
        try:
            notes = json.loads((self.logs / "notes.json").read_text())["notes"]
        except FileNotFoundError:
            return
        now = time.time()
        self.hub.say(
            *(
                Event(rank=None, what=n["what"], text=n["text"], severity=n.get("severity", "info"), wall_s=now)
                for n in notes
            )
        )

    # ---- while it runs ---------------------------------------------------------------------------------------------
    def _collect(self) -> None:
        """Reap torchrun, our child, and orphans of it that we adopted."""
        ended = reap()
        self._attempt.collect(ended)
        self._outputs.collect(ended)

    def _meet(self, hello: Hello) -> None:
        """A rank has sent its hello; the first one after a restart tells from which step the run continues."""
        self._attempt.watch(hello.rank, hello.pid)
        if not self.run_file.nproc:
            self._learn_world_size(hello.world_size)
        if not self._restart_text:
            return
        text, self._restart_text = self._restart_text, ""
        lost = max(0, self._reached - hello.start_step)
        where = f"continues from step {hello.start_step}" if hello.start_step else "starts again from step 0"
        again = f"{lost} step{'s' * (lost > 1)} replayed" if lost else "no step lost"
        self.hub.event("restart", f"{text}; {where}, {again}", "warning", lost_steps=lost)
        changes: dict[str, Any] = {"lost_steps": lost, "step": hello.start_step}
        if self.hub.status.state == "restarting":
            changes |= {"state": "starting", "reason": f"{text}, {again}"}
        if hello.start_step:
            changes["last_checkpoint_step"] = hello.start_step
        self.hub.set_status(**changes)

    def _learn_world_size(self, world_size: int) -> None:
        """A wrapped command has started so many ranks."""
        self.run_file = self.run_file.model_copy(update={"nproc": world_size})
        write_json(self.path / "run.json", self.run_file)
        self._taker.nproc = world_size
        self.hub.expect_ranks(world_size)

    def _begin_stop(self, command: Command) -> None:
        """A stop was accepted. A wrapped command whose trainer can't stop by itself is sent SIGTERM."""
        self._stop_watch.begin(command)
        hello = self.hub.state.hello
        if self.run_file.wrapped and (hello is None or "stop" in hello.impossible):
            self.hub.event("signal", "the trainer can't be asked to stop: the command is sent SIGTERM", "warning")
            self._attempt.terminate_launcher()

    def _stop_by_signal(self, number: int) -> None:
        """A signal of our own, or one that a rank has passed on; a batch system sends it to every process, so there
        may be many."""
        if not self._stop_watch.has_deadline:
            self.hub.command(stop_by_signal(signal.Signals(number).name))

    def _abort_command(self, command: Command) -> None:
        self._abort(f"aborted by {command.who}" if command.who else "aborted on request")

    def _stacks_command(self, command: Command) -> None:
        self._background.add("taking the stacks", self._taker.answer(command))

    def _abort(self, reason: str) -> None:
        if self._abort_reason is None and not self._attempt.ended.is_set():
            self._abort_reason = reason
            self._attempt.end_asked.set()

    def end_attempt(self, reason: str) -> None:
        """End the current ranks as failed for `reason`, because they hang and cannot report it themselves. Call it
        in the event loop. Does nothing once they have ended or are being ended. Whether they are restarted is
        decided as after any failure."""
        attempt = self._attempt
        if not attempt.end_asked.is_set() and not attempt.ended.is_set() and not attempt.rank_died.is_set():
            attempt.failure = reason
            attempt.end_asked.set()

    async def _watch_for_hangs(self) -> None:
        ends = self.end_attempt if self._settings.restarts.on_hang else None
        await HangWatch(self.hub, self._taker, ends, self.end_attempt).watch()

    # ---- attempts ----------------------------------------------------------------------------------------------------
    async def _attempts(self, locks: tuple[int, ...]) -> Outcome:
        """Run one attempt after the other; returns how the last one ended."""
        while True:
            await self._until_over()
            outcome, again = self._judge()
            if not again:
                return outcome
            try:
                self._restart(outcome, locks)
            except (RunError, OSError) as error:
                return _with_reason(outcome, f"it could not be restarted: {error}")

    async def _until_over(self) -> None:
        """Wait until the attempt has ended by itself, by the death of a rank, or by an abort or `end_attempt`, and
        end all its processes."""
        attempt = self._attempt
        if self.run_file.wrapped:  # what the death of a rank means is its launcher's business
            await _first_of(attempt.ended, attempt.end_asked)
        else:
            await _first_of(attempt.ended, attempt.rank_died, attempt.end_asked)
        witness: asyncio.Task[None] | None = None
        if not attempt.end_asked.is_set():
            if not attempt.ended.is_set() and self.run_file.nproc > 1:
                witness = asyncio.create_task(self._look_at_survivors())
            # The work of the other ranks is lost. torchrun ends them too, and logs which rank failed first.
            await _first_of(attempt.ended, attempt.end_asked, timeout_s=DEATH_PATIENCE_S)
            await self._hear_last_words()
        attempt.look_away()
        await self._end_processes(TERM_PATIENCE_S if attempt.end_asked.is_set() else TERM_PATIENCE_S / 5)
        if witness is not None:
            await asyncio.wait([witness], timeout=DEATH_PATIENCE_S)
            witness.cancel()

    async def _look_at_survivors(self) -> None:
        """Save what the other ranks were doing when one died, before torchrun ends them."""
        report = await self._taker.survivors()
        if report is not None and report.path:
            text = f"{report.verdict}; what the other ranks were doing: {report.path}"
            self.hub.event("evidence", text, stacks=report.path, evidence=report.evidence)

    async def _hear_last_words(self) -> None:
        """The ranks are gone, but their goodbyes may still be on their way. After a failure wait less: a killed rank
        sends none."""
        short = self._attempt.exit_code != 0 or self._silent_script()
        deadline = time.monotonic() + (LAST_WORDS_S / 4 if short else LAST_WORDS_S)
        ranks = self.hub.state.ranks.values()
        while time.monotonic() < deadline and (
            any(state.hello and not state.goodbye for state in ranks) or self._silent_script()
        ):
            await asyncio.sleep(0.02)

    def _silent_script(self) -> bool:
        """Whether a script runs here and no rank has sent a hello: only initialize() sends one."""
        return bool(self.run_file.script) and not self._spoke()

    def _spoke(self) -> bool:
        return any(state.hello for state in self.hub.state.ranks.values())

    async def _end_processes(self, patience_s: float) -> None:
        """SIGTERM, some patience, SIGKILL, for all descendants."""
        left = descendants(self._outputs.pids)
        send(left, signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while left and time.monotonic() < deadline:
            if self._attempt.has_only_launcher(left):
                deadline = min(deadline, time.monotonic() + LAUNCHER_PATIENCE_S)
            await asyncio.sleep(0.05)
            self._collect()
            left = descendants(self._outputs.pids)
        self._collect()
        self._stuck = kill_descendants(spare=self._outputs.pids)
        if self._stuck:
            self.hub.event(
                "exit", f"{self._stuck} processes can't be killed: they hang in the kernel (a wedged driver?)", "error"
            )

    def _evidence(self) -> FailureEvidence:
        state, attempt = self.hub.state, self._attempt
        self._background.hear_xids()
        return FailureEvidence(
            nproc=self.run_file.nproc,
            wrapped=self.run_file.wrapped is not None,
            launcher_exit=attempt.exit_code,
            logs=attempt.logs,
            launcher_killed=attempt.killed,
            goodbyes={rank: rank_state.goodbye for rank, rank_state in state.ranks.items() if rank_state.goodbye},
            exit_codes=attempt.rank_codes,
            ended_by_us=attempt.ended_by_us,
            stopping=self.hub.status.state == "stopping",
            abort_reason=self._abort_reason,
            failure=attempt.failure,
            steps={rank: rank_state.step.step for rank, rank_state in state.ranks.items() if rank_state.step},
            silent_script=self._silent_script(),
            spoke=self._spoke(),
            start_step=state.hello.start_step if state.hello else 0,
            system=attempt.collector.collect(state),
        )

    def _judge(self) -> tuple[Outcome, bool]:
        """How the attempt ended and whether another one follows; if none follows a failure, the outcome says why."""
        seen = self._evidence()
        outcome = decide(seen)
        if outcome.state != "failed":
            return outcome, False
        refusal = self._restarts.refusal(
            Failure.of(outcome, seen),
            stop_asked=seen.stopping or self.hub.router.is_open("stop", "abort"),
            stuck=self._stuck,
        )
        return _with_reason(outcome, refusal or ""), refusal is None

    def _restart(self, outcome: Outcome, locks: tuple[int, ...]) -> None:
        """Start the next attempt from the newest complete checkpoint, which its ranks find by themselves.

        Nothing is awaited in here: a command comes either before, and counts in `_judge`, or after, and is for the new
        ranks. Raises RunError or OSError if the attempt cannot start.
        """
        state, failed = self.hub.state, self.run_file.attempt
        self._reached = max(
            [self.hub.status.step, state.step]
            + [rank.step.step for rank in state.ranks.values() if rank.step]
            + [rank.goodbye.step for rank in state.ranks.values() if rank.goodbye]
        )
        self._tell_error(outcome)
        self.hub.event("attempt", f"attempt {failed} failed: {outcome.reason}; the ranks are restarted", "error")
        self.run_file = self.run_file.model_copy(update={"attempt": failed + 1})
        attempt = Attempt(self.run_file, self.path)
        make_private_folder(attempt.logs)
        write_json(self.path / "run.json", self.run_file)
        self._restart_text = f"{self._restarts.count()}: {outcome.reason}"
        self._attempt = attempt
        self.hub.begin_attempt(
            self.run_file,
            state="restarting",
            reason=self._restart_text,
            restarts=self._restarts.total,
            restart_reason=outcome.reason,
            failed_rank=outcome.failed_rank,
            lost_steps=0,
        )
        self._start_watch.forget()
        attempt.start(resume=True, keep=locks)

    def _tell_error(self, outcome: Outcome) -> None:
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

    async def _finish(self, outcome: Outcome) -> None:
        """Publish how the run ended: to open commands, the screens and state.json."""
        state = self.hub.state
        good = outcome.state in ("finished", "stopped")
        # Telemetry may have lost the last step; a goodbye on a good end knows it.
        step = max([state.step, *(rank.goodbye.step for rank in state.ranks.values() if rank.goodbye and good)])
        self.hub.router.finish(outcome.state, step)
        self._tell_error(outcome)
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
        # On disk first: when a screen shows the end, the directory has it too.
        status = self.hub.status.model_copy(update=end)
        await self._status_file.written(status)
        self.hub.set_status(**end)
        self._verdicts.look(time.monotonic())


def _with_reason(outcome: Outcome, more: str) -> Outcome:
    return replace(outcome, reason=f"{outcome.reason}; {more}") if more else outcome


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Wait until one of the events is set or the time is over."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=timeout_s)
    for task in tasks:
        task.cancel()
