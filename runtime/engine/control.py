"""Applies commands at the boundary: all ranks at the same optimizer step, which rank 0 reports back.

[Note: how ranks agree]
The hub numbers commands and sends each to every rank. While training, only rank 0 checks for them: a flag in the
boundary's all-reduce says that it has commands, and rank 0 broadcasts them. While paused, no collective runs: each rank
applies the hub's numbered log by itself, and since all ranks paused at the same step and read the same log, they do the
same. A `resume` ends the pause at the same command number on all ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from runtime.config.knobs import KNOBS, KnobError, get_knob
from runtime.engine.autosave import Answer, Autosave
from runtime.engine.nonfinite import NonFiniteSteps
from runtime.engine.profile import StepProfiler
from runtime.engine.release import DeviceMemoryRelease
from runtime.engine.session import Session
from runtime.engine.snapshots import MemorySnapshots
from runtime.state.train_state import TrainState
from runtime.wire.messages import Ack, Command
from runtime.zero.step_stats import StepStats

log = logging.getLogger("runtime.train")

PAUSED_POLL_S = 5.0
"""Seconds that a paused rank sleeps at a time; a command or a dead supervisor wakes it at once."""
ORPHANED = "the supervisor is gone"


class RunStopped(SystemExit):
    """Raised by engine.step() after a `stop` command, once the state is saved. Exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


def knobs_of(state: TrainState) -> dict[str, Any]:
    """The initial value of every knob, from the config."""
    section = state.config.zerotop
    knobs: dict[str, Any] = {
        "log_level": section.log.level,
        "log_interval": section.log.interval,
        "telemetry_hz": section.telemetry.hz,
        "checkpoint_interval": section.checkpoint.interval,
        "checkpoint_minutes": section.checkpoint.minutes,
        "checkpoints_kept": section.checkpoint.keep,
        "lr_factor": state.counters.lr_factor,
    }
    assert knobs.keys() == KNOBS.keys()
    return knobs


class Control:
    """Applies the commands of one run on one rank."""

    def __init__(
        self,
        state: TrainState,
        session: Session,
        knobs: dict[str, Any],
        autosave: Autosave,
        nonfinite: NonFiniteSteps,
        memory: DeviceMemoryRelease,
    ) -> None:
        """knobs: updated in place by `set`. memory: moves GPU memory to the host for `pause --release`."""
        self._state, self._link, self.knobs = state, session.link, knobs
        self._comm, self._telemetry = state.comm, state.comm.telemetry
        self._autosave, self._nonfinite, self._memory = autosave, nonfinite, memory
        self._profiler = StepProfiler(state.comm.rank, state.device, session.link, session.folder)
        self._snapshots = MemorySnapshots(state, session)
        self._announced = False
        """The ranks have heard that commands wait, and have not come to them yet."""

    # ---- the boundary ----------------------------------------------------------------------------------------------
    def command_waits(self, acts_at: int) -> bool:
        """Whether, on rank 0, commands wait, or an automatic checkpoint is due at the end of step `acts_at`, when the
        ranks will act upon it. Call it once per step."""
        if self._comm.rank != 0:
            return False
        waits, self._announced = self._link.inbox.waiting() and not self._announced, self._link.inbox.waiting()
        return self._autosave.is_due(acts_at) or waits

    def stop_asked(self) -> bool:
        """Whether this rank must stop because its supervisor is gone."""
        return self._link.inbox.orphaned

    def at_boundary(self, stats: StepStats | None) -> None:
        """End a profile of which this was the last step, start a checkpoint that is due (deferred while steps are not
        finite), apply commands, stop if any rank must.

        stats: what the ranks have agreed on; None if nothing is known yet. Raises RunStopped after a stop.
        """
        if self._profiler.active:
            self._profiler.at_boundary(self._step)
        if self._snapshots.is_due:
            self._finish_snapshot()
        if stats is not None and stats.command_waits:
            self._state.synchronize()
            self._announced = False
            rank_0 = self._comm.rank == 0
            due = self._nonfinite.last_is_finite and rank_0 and self._autosave.can_begin()
            taken = [command.model_dump() for command in self._link.inbox.take()] if rank_0 else []
            due, commands = self._comm.broadcast_object((due, taken))
            if due:
                self._autosave.save_due(self._keeps_old)
            self._apply_all(deque(Command.model_validate(command) for command in commands))
        if stats is not None and stats.stop_asked:
            self._stop(ORPHANED)
        self._autosave.prepare()

    def finish(self) -> None:
        """After the last step: save it if automatic checkpoints are on and it was finite, and tell the hub."""
        if self._nonfinite.last_is_finite and self._autosave.enabled:
            self._autosave.save(self._keeps_old)
        self._autosave.wait_for_save()
        self._profiler.end(self._step, "ended early: the training is over", wait=True)
        self._link.goodbye("finished", self._step)

    def forget_saved(self) -> None:
        """Reset what depends on the training state, after another one has been loaded."""
        self.knobs["lr_factor"] = self._state.counters.lr_factor
        self._autosave.forget()
        self._nonfinite.forget()

    @property
    def _step(self) -> int:
        return self._state.counters.global_steps

    @property
    def _keeps_old(self) -> bool:
        """Whether to delete no older checkpoint, as the last step was not finite and its state may be useless."""
        return not self._nonfinite.last_is_finite

    # ---- commands: see [Note: how ranks agree] ---------------------------------------------------------------------
    def _apply_all(self, commands: deque[Command]) -> None:
        paused = False
        while commands or paused:
            command = commands.popleft() if commands else self._next_while_paused()
            if command is None:
                continue
            self._link.inbox.mark_applied(command.number)
            if command.name == "pause":
                paused = self._pause(command)
            elif command.name == "resume":
                paused = not self._resume(command)
            elif command.name == "profile" and paused:
                self._answer(command, "rejected", "the run is paused and takes no steps: resume it, and profile then")
            else:
                self._apply(command, paused)
                if paused:
                    self._telemetry.enter("paused", self._step, 0)

    def _next_while_paused(self) -> Command | None:
        if self._link.inbox.orphaned:
            self._stop(ORPHANED, cannot_save=self._restore_memory())
        return self._link.inbox.next(PAUSED_POLL_S)

    def _apply(self, command: Command, paused: bool) -> None:
        released = self._memory.released
        if command.name in ("checkpoint", "stop") and not self._restored(command):
            return
        match command.name:
            case "checkpoint":
                self._checkpoint(command)
                if released:
                    self._memory.release()
            case "set":
                self._set(command)
            case "profile":
                self._profile(command)
            case "memory-snapshot":
                self._snapshot(command, 0 if paused else int(command.arguments.get("steps", 1)))
            case "stop":
                self._stop(f"stop requested by {command.who or 'the keyboard'}", command)
            case _:
                self._answer(command, "rejected", f"{command.name} is not a command that ranks know")

    def _pause(self, command: Command) -> bool:
        """Pause, and with the argument `release` free GPU memory. Returns whether the run is paused."""
        result: dict[str, Any] = {}
        if command.arguments.get("release"):
            if self._state.device.type != "cuda":
                self._answer(command, "rejected", "the ranks are on CPUs: there is no GPU memory to release")
                return False
            result = {"released_bytes": sum(self._comm.gather_objects(self._memory.release()))}
        self._answer(command, "applied", result=result)
        self._profiler.end(self._step, "ended early: the run was paused")
        self._telemetry.enter("paused", self._step, 0)
        return True

    def _resume(self, command: Command) -> bool:
        """Restore GPU memory and resume. Returns whether the run continues."""
        if not self._restored(command):
            return False
        self._answer(command, "applied")
        self._telemetry.enter("step", self._step, 0)
        return True

    def _restored(self, command: Command) -> bool:
        """Undo `pause --release` on all ranks or on none. Returns whether that succeeded; if not, rejects `command`."""
        problem = self._restore_memory()
        if problem:
            self._answer(command, "rejected", problem)
        return not problem

    def _restore_memory(self) -> str:
        """Undo `pause --release`. Returns why it failed on any rank; empty if it succeeded."""
        problem = ""
        if not self._memory.released:
            return ""
        try:
            self._memory.restore()
        except torch.OutOfMemoryError as error:
            problem = f"rank {self._comm.rank}: {str(error).splitlines()[0]}"
        problems = [found for found in self._comm.gather_objects(problem) if found]
        if problems and not problem:
            self._memory.release()
        return f"other processes use the GPU memory that was released: {problems[0]}" if problems else ""

    def _checkpoint(self, command: Command) -> None:
        autosave = self._autosave
        if autosave.folder is None:
            self._answer(command, "rejected", "this engine has no run directory to save into")
        elif autosave.has_this_step(self._keeps_old):
            self._answer(command, "applied", result={"path": str(autosave.path), "step": self._step})
        else:
            self._answer(command, "accepted", f"the checkpoint of step {self._step} is being written")
            if not autosave.begin(self._keeps_old, self._answerer(command)):
                self._answer(command, "rejected", autosave.problem)

    def _profile(self, command: Command) -> None:
        """Begin a profile on the chosen ranks. It is applied if any of them could begin."""
        refusals = [found for found in self._comm.gather_objects(self._profiler.refusal()) if found]
        if refusals:
            self._answer(command, "rejected", refusals[0])
            return
        problems = [found for found in self._comm.gather_objects(self._profiler.begin(command, self._step)) if found]
        if len(problems) == len(command.arguments["ranks"]):
            self._answer(command, "rejected", problems[0])
            return
        steps = [self._step + 1, self._step + command.arguments["steps"]]
        result = {"steps": steps, "ranks": command.arguments["ranks"]} | ({"problems": problems} if problems else {})
        self._answer(command, "applied", result=result)

    def _snapshot(self, command: Command, steps: int) -> None:
        """Begin a memory snapshot of the next `steps` steps, or write one at once."""
        problem = self._snapshots.begin(command, steps)
        if problem:
            self._answer(command, "rejected", problem)
        elif steps:
            self._answer(command, "accepted", f"{steps} step{'s' * (steps > 1)} of memory history are being recorded")
        else:
            self._finish_snapshot()

    def _finish_snapshot(self) -> None:
        command = self._snapshots.command
        assert command is not None
        folder, problem = self._snapshots.finish()
        if problem:
            self._answer(command, "rejected", f"the memory snapshot could not be written: {problem}")
        else:
            self._answer(command, "applied", result={"path": str(folder)})

    def _set(self, command: Command) -> None:
        """Check all values of a `set`, then apply all of them, or none."""
        try:
            values = {name: get_knob(name).check(value) for name, value in command.arguments.items()}
        except KnobError as error:
            self._answer(command, "rejected", str(error))
            return
        self.knobs.update(values)
        if "lr_factor" in values:
            self._state.counters.lr_factor = float(values["lr_factor"])
            self._autosave.forget()  # the factor is part of a checkpoint
        if "telemetry_hz" in values:
            self._link.hz = float(values["telemetry_hz"])
        if "log_level" in values:
            self.apply_log_level()
        self._answer(command, "applied", result=values)

    def apply_log_level(self) -> None:
        """Set the loggers to the knob log_level."""
        level = str(self.knobs["log_level"]).upper()
        logging.getLogger("runtime").setLevel(level)
        self._link.log_handler.setLevel(level)

    def _stop(self, why: str, command: Command | None = None, cannot_save: str = "") -> None:
        """Save unless this step is saved, tell the hub, and raise RunStopped. cannot_save: why saving is impossible."""
        self._profiler.end(self._step, "ended early: the run stops")
        autosave, problem = self._autosave, cannot_save
        if command is not None and autosave.folder is not None and not cannot_save:
            self._answer(command, "accepted", f"the checkpoint of step {self._step} is being written")
        saved = not cannot_save and (autosave.folder is None or autosave.save(self._keeps_old))
        if not saved:
            problem = problem or autosave.problem
        if command is not None:
            path = str(autosave.path) if autosave.path and saved else None
            self._answer(command, "applied", result={"checkpoint": path})
        self._profiler.end(self._step, wait=True)
        log.info(f"stopping at step {self._step}: {why}{'' if saved else f' (no checkpoint: {problem})'}")
        self._link.goodbye("stopped", self._step, "" if saved else problem)
        raise RunStopped

    def _answerer(self, command: Command) -> Answer:
        return lambda state, reason, result, step: self._answer(command, state, reason, result, step)

    def _answer(
        self,
        command: Command,
        state: Any,
        reason: str = "",
        result: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        if self._comm.rank != 0:
            return
        self._link.ack(
            Ack(
                id=command.id,
                number=command.number,
                state=state,
                step=self._step if step is None else step,
                reason=reason,
                result=dict(result or {}),
            )
        )
