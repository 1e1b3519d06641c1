"""Commands at a step boundary: all ranks apply each one at the same optimizer step, and rank 0 answers with that step.

[Note: how ranks agree]
The hub numbers commands and sends each to every rank. While training, only rank 0 looks: the boundary's all-reduce
carries "rank 0 has commands", and rank 0 broadcasts them. While paused no collective runs: each rank follows the hub's
numbered log for itself, and since all paused at one step and read one log in one order, they do the same things. A
`resume` ends that at the same number on all ranks.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from runtime.config.knobs import KNOBS, KnobError, get_knob
from runtime.engine.autosave import Answer, Autosave
from runtime.engine.nonfinite import NonFiniteSteps
from runtime.engine.release import DeviceMemoryRelease
from runtime.engine.session import Session
from runtime.state.train_state import TrainState
from runtime.wire.messages import Ack, Command
from runtime.zero.step_stats import StepStats

log = logging.getLogger("runtime.train")

PAUSED_POLL_S = 5.0
"""How long a paused rank sleeps at a time; a command or a dead supervisor wakes it at once."""
ORPHANED = "the supervisor is gone"


class RunStopped(SystemExit):
    """Raised out of engine.step() when the run was asked to stop and its state is saved. Exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


def knobs_of(state: TrainState) -> dict[str, Any]:
    """What `set` can change, as the config has it."""
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
    """Obeys the commands of one run, on one rank."""

    def __init__(
        self,
        state: TrainState,
        session: Session,
        knobs: dict[str, Any],
        autosave: Autosave,
        nonfinite: NonFiniteSteps,
        memory: DeviceMemoryRelease,
    ) -> None:
        """knobs: changed in place by `set`. memory: what `pause --release` moves out."""
        self._state, self._link, self.knobs = state, session.link, knobs
        self._comm, self._telemetry = state.comm, state.comm.telemetry
        self._autosave, self._nonfinite, self._memory = autosave, nonfinite, memory

    # ---- the boundary ----------------------------------------------------------------------------------------------
    def command_waits(self) -> bool:
        """Rank 0: there are commands, or an automatic checkpoint is due. Once at each boundary."""
        return self._comm.rank == 0 and (self._autosave.is_due() or self._link.inbox.waiting())

    def stop_asked(self) -> bool:
        """This rank must stop: its supervisor is gone."""
        return self._link.inbox.orphaned

    def at_boundary(self, stats: StepStats) -> None:
        """Automatic checkpoint (at the next finite step, if this one isn't), then commands, then a stop that some rank
        needs.

        Raises TrainingError on all ranks when too many steps in a row were not finite, RunStopped after a stop.
        """
        self._nonfinite.count(self._step, stats.grad_norm, stats.loss, self._autosave.newest)
        if stats.command_waits:
            rank_0 = self._comm.rank == 0
            due = self._nonfinite.last_is_finite and rank_0 and self._autosave.can_begin()
            taken = [command.model_dump() for command in self._link.inbox.take()] if rank_0 else []
            due, told = self._comm.broadcast_object((due, taken))
            if due:
                self._autosave.save_due(self._keeps_old)
            self._apply_all(deque(Command.model_validate(command) for command in told))
        if stats.stop_asked:
            self._stop(ORPHANED)
        self._autosave.prepare()

    def finish(self) -> None:
        """The last step is done: save it if checkpoints are on (and it was finite), and say goodbye."""
        if self._nonfinite.last_is_finite and self._autosave.wanted:
            self._autosave.save(self._keeps_old)
        self._autosave.wait_for_save()
        self._link.goodbye("finished", self._step)

    def forget_saved(self) -> None:
        """Another training state has been loaded."""
        self.knobs["lr_factor"] = self._state.counters.lr_factor
        self._autosave.forget()
        self._nonfinite.forget()

    @property
    def _step(self) -> int:
        return self._state.counters.global_steps

    @property
    def _keeps_old(self) -> bool:
        """What a step that is not finite leaves takes no good checkpoint's place."""
        return not self._nonfinite.last_is_finite

    # ---- commands: see [Note: how ranks agree] ---------------------------------------------------------------------
    def _apply_all(self, commands: deque[Command]) -> None:
        paused = False
        self._state.synchronize()
        while commands or paused:
            command = commands.popleft() if commands else self._next_while_paused()
            if command is None:
                continue
            self._link.inbox.mark_applied(command.number)
            if command.name == "pause":
                paused = self._pause(command)
            elif command.name == "resume":
                paused = not self._resume(command)
            else:
                self._apply(command)
                if paused:
                    self._telemetry.enter("paused", self._step, 0)

    def _next_while_paused(self) -> Command | None:
        if self._link.inbox.orphaned:
            self._stop(ORPHANED, cannot_save=self._restore_memory())
        return self._link.inbox.next(PAUSED_POLL_S)

    def _apply(self, command: Command) -> None:
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
            case "stop":
                self._stop(f"stop asked for by {command.who or 'the keyboard'}", command)
            case _:
                self._answer(command, "rejected", f"{command.name} is not a command that ranks know")

    def _pause(self, command: Command) -> bool:
        """Whether the run is paused."""
        result: dict[str, Any] = {}
        if command.arguments.get("release"):
            if self._state.device.type != "cuda":
                self._answer(command, "rejected", "the ranks are on CPUs: there is no GPU memory to release")
                return False
            result = {"released_bytes": sum(self._comm.gather_objects(self._memory.release()))}
        self._answer(command, "applied", result=result)
        self._telemetry.enter("paused", self._step, 0)
        return True

    def _resume(self, command: Command) -> bool:
        """Whether the run goes on."""
        if not self._restored(command):
            return False
        self._answer(command, "applied")
        self._telemetry.enter("step", self._step, 0)
        return True

    def _restored(self, command: Command) -> bool:
        """After `pause --release`: everything to the GPUs again, on all ranks or on none."""
        problem = self._restore_memory()
        if problem:
            self._answer(command, "rejected", problem)
        return not problem

    def _restore_memory(self) -> str:
        """Returns what is in the way, on any rank."""
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
        return f"the GPU memory that was released is in use by others: {problems[0]}" if problems else ""

    def _checkpoint(self, command: Command) -> None:
        autosave = self._autosave
        if autosave.folder is None:
            self._answer(command, "rejected", "there is no run directory to save into")
        elif autosave.has_this_step(self._keeps_old):
            self._answer(command, "applied", result={"path": str(autosave.path), "step": self._step})
        elif not autosave.begin(self._keeps_old, self._answerer(command)):
            self._answer(command, "rejected", autosave.problem)

    def _set(self, command: Command) -> None:
        """All values of one `set` or none: checked first, then applied."""
        try:
            values = {name: get_knob(name).check(value) for name, value in command.arguments.items()}
        except KnobError as error:
            self._answer(command, "rejected", str(error))
            return
        self.knobs.update(values)
        if "lr_factor" in values:
            self._state.counters.lr_factor = float(values["lr_factor"])
            self._autosave.forget()  # a checkpoint holds the factor
        if "telemetry_hz" in values:
            self._link.hz = float(values["telemetry_hz"])
        if "log_level" in values:
            self.apply_log_level()
        self._answer(command, "applied", result=values)

    def apply_log_level(self) -> None:
        level = str(self.knobs["log_level"]).upper()
        logging.getLogger("runtime").setLevel(level)
        self._link.log_handler.setLevel(level)

    def _stop(self, why: str, command: Command | None = None, cannot_save: str = "") -> None:
        """Save (unless this step is saved), say goodbye, leave."""
        autosave, problem = self._autosave, cannot_save
        if command is not None and autosave.folder is not None and not cannot_save:
            self._answer(command, "accepted", f"the checkpoint of step {self._step} is being written")
        saved = not cannot_save and (autosave.folder is None or autosave.save(self._keeps_old))
        if not saved:
            problem = problem or autosave.problem
        if command is not None:
            path = str(autosave.path) if autosave.path and saved else None
            self._answer(command, "applied", result={"checkpoint": path})
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
                rank=0,
                wall_s=time.time(),
            )
        )
