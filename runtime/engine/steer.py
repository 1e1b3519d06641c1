"""Commands at a step boundary: all ranks apply each one at the same optimizer step, and rank 0 answers with that step.

[Note: how ranks agree]
The hub numbers commands and sends each to every rank. While training, only rank 0 looks: the boundary's all-reduce
carries "rank 0 has commands", and rank 0 broadcasts them. While paused no collective runs: each rank follows the hub's
numbered log for itself, and since all paused at one step and read one log in one order, they do the same things. A
`resume` ends that at the same number on all ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime import checkpoint
from runtime.config.knobs import KNOBS, KnobError, get_knob
from runtime.engine.setup import Session
from runtime.state.precision import TrainingError
from runtime.wire.messages import Ack, Command, StepResult
from runtime.zero.step_stats import Boundary

if TYPE_CHECKING:
    from runtime.checkpoint.process import Outcome
    from runtime.engine import Engine

log = logging.getLogger("runtime.train")

MOST_UNSOUND = 10
"""Steps in a row that are not finite, outside fp16, after which a run ends: it would only count steps."""
WAIT_S = 10.0
"""So long training waits at most for the checkpoint before, when the next one is due."""
PAUSED_POLL_S = 5.0
"""How long a paused rank sleeps at a time; a command or a dead supervisor wakes it at once."""


ORPHANED = "the supervisor is gone"


class RunStopped(SystemExit):
    """Raised out of engine.step() when the run was asked to stop and its state is saved. Exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Steering:
    """Knobs, automatic checkpoints and commands of one rank."""

    def __init__(self, engine: Engine, session: Session) -> None:
        self.engine, self.session, self.link = engine, session, session.link
        section = engine.config.zerotop
        self.knobs: dict[str, Any] = {
            "log_level": section.log.level,
            "log_interval": section.log.interval,
            "telemetry_hz": section.telemetry.hz,
            "checkpoint_interval": section.checkpoint.interval,
            "checkpoint_minutes": section.checkpoint.minutes,
            "checkpoints_kept": section.checkpoint.keep,
            "lr_factor": engine.lr_factor,
        }
        assert self.knobs.keys() == KNOBS.keys()
        self.folder = self._checkpoint_folder()
        self._begun_step = -1
        """The step whose checkpoint was begun last: the same on all ranks."""
        self._saved_path: Path | None = None
        self._due = False  # an automatic checkpoint is; rank 0 decides
        self._put_off = False  # and the event that says so has been sent
        self._last_due_s = time.monotonic()
        self._sound = True
        """Loss and gradient norm of the last step were finite. What a step that wasn't leaves (batch norm's averages)
        may be of no use, so it takes no good checkpoint's place."""
        self._unsound: list[int] = []
        """The steps since the last sound one, outside fp16."""
        self._culprits: tuple[int, ...] = ()
        """The ranks whose own loss was not finite in the newest step that wasn't; the same on all ranks."""

    def _checkpoint_folder(self) -> Path | None:
        """Automatic and keyboard checkpoints need a run; a script without one saves by itself. A later engine of the
        process has a folder inside the first one's."""
        run, chosen = self.session.run, self.engine.config.zerotop.checkpoint.folder
        if self.session.folder is None or run is None:
            return None
        folder = self.session.folder / "checkpoints"
        if chosen:
            folder = Path(run.config_folder, Path(chosen).expanduser()) / run.name
        return folder if self.session.number == 1 else folder / f"engine-{self.session.number}"

    # ---- the engine asks -----------------------------------------------------------------------------------
    def command_waits(self) -> bool:
        """Rank 0: there are commands, or an automatic checkpoint is due. Once at each boundary."""
        return self.engine.comm.rank == 0 and (self._checkpoint_is_due() or self.link.inbox.waiting())

    def _checkpoint_is_due(self) -> bool:
        """At the step that is about to end. One that is still being written is waited for, not long; then the next is
        put off until it is done."""
        if self.folder is None:
            return False
        step, now = self.engine.global_steps + 1, time.monotonic()
        interval, minutes = self.knobs["checkpoint_interval"], self.knobs["checkpoint_minutes"]
        if (interval and step % interval == 0) or (minutes and now - self._last_due_s >= 60 * minutes):
            self._due, self._last_due_s = True, now
        if not (interval or minutes):
            self._due = False
        if self._due and self.engine.saver.busy and not self._put_off:
            self._put_off = not self.engine.saver.wait_briefly(WAIT_S)
            if self._put_off:
                text = f"the checkpoint of step {step} is put off: the one before is still being written"
                self.link.event("checkpoint", text, severity="warning", step=step)
        return self._due and not self.engine.saver.busy

    def stop_asked(self) -> bool:
        return self.link.inbox.orphaned

    def at_boundary(self, agreed: Boundary) -> None:
        """Automatic checkpoint (at the next sound step, if this one isn't), then commands, then a stop that some rank
        needs.

        Raises TrainingError on all ranks when the last MOST_UNSOUND steps were not finite, outside fp16.
        """
        rank_0 = self.engine.comm.rank == 0
        self._sound = math.isfinite(agreed.grad_norm) and _sound(agreed.loss)
        self._count_unsound(self.engine.global_steps)
        if agreed.command_waits:
            due = self._due and self._sound and not self.engine.saver.busy
            taken = [command.model_dump() for command in self.link.inbox.take()] if rank_0 else []
            due, told = self.engine.comm.broadcast_object((due, taken))
            commands = [Command.model_validate(command) for command in told]
            if due:
                self._due = self._put_off = False
                self._save()
            self._apply_all(deque(commands))
        if agreed.stop_asked:
            self._stop(ORPHANED)
        if self.folder is not None and (self.knobs["checkpoint_interval"] or self.knobs["checkpoint_minutes"]):
            self.engine.saver.prepare()

    def _count_unsound(self, step: int) -> None:
        if self._sound or self.engine.config.precision == "fp16":
            self._unsound = []
            return
        self._unsound.append(step)
        if len(self._unsound) < MOST_UNSOUND:
            return
        newest = self._newest_checkpoint()
        raise TrainingError(
            f"the loss or the gradient norm was not finite in {MOST_UNSOUND} steps in a row, from step "
            f"{self._unsound[0]} on: lower optimizer.params.lr, set gradient_clipping, or look at the data of that "
            f"step{self.whose()}. "
            + (f"The newest checkpoint is {newest}" if newest is not None else "There is no checkpoint to return to"),
            self.culprit,
        )

    def _newest_checkpoint(self) -> Path | None:
        newest = checkpoint.newest(self.folder) if self.folder is not None else None
        return newest or self.engine.last_checkpoint

    @property
    def culprit(self) -> int | None:
        """The rank with whose data the newest step that was not finite began; None where no single one can be told."""
        return self._culprits[0] if len(self._culprits) == 1 else None

    def whose(self) -> str:
        """Of a step that was not finite: "; only the loss of rank 1 is not finite", where that tells something."""
        if not self._culprits or len(self._culprits) == self.engine.comm.world_size:
            return ""
        names = ", ".join(str(rank) for rank in self._culprits)
        one = len(self._culprits) == 1
        return (
            f"; only the loss of rank {names} is not finite" if one else f"; of ranks {names} the losses are not finite"
        )

    def progress(self, result: StepResult, own_loss: torch.Tensor | float | None) -> None:
        """A log line every log_interval steps, on rank 0; and a word on every step that was not finite, from the rank
        where it began. own_loss: this rank's, of which result.loss is the mean; None where it is not known."""
        if not (_sound(result.grad_norm) and _sound(result.loss)):  # the same on all ranks
            self._culprits = self._not_finite_on(own_loss)
            self._tell_unsound(result)
        if result.rank != 0 or result.step % self.knobs["log_interval"]:
            return
        total = self.engine.config.zerotop.train.steps
        of = f"/{total}" if total else ""
        speed = f" · {result.tokens_per_s * self.engine.comm.world_size:,.0f} tokens/s" if result.tokens_per_s else ""
        loss = "n/a" if result.loss is None else f"{result.loss:.4f}"
        log.info(
            f"step {result.step}{of} · loss {loss} · lr {result.lr:.3g} · norm "
            f"{result.grad_norm:.3f} · {result.step_ms:.1f} ms{speed}"
        )

    def _not_finite_on(self, own_loss: torch.Tensor | float | None) -> tuple[int, ...]:
        """The ranks whose own loss is not finite. Collective."""
        comm = self.engine.comm
        flags = torch.zeros(comm.world_size, dtype=torch.float64, device=comm.device)
        flags[comm.rank] = not _sound(own_loss)
        comm.all_reduce(flags).wait()
        return tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)

    def _tell_unsound(self, result: StepResult) -> None:
        if result.rank != (self._culprits[0] if self._culprits else 0):
            return
        what, severity = "not finite", "error"
        if result.skipped and result.loss_scale is not None:  # part of finding the scale
            what, severity = "overflow", "warning"
            text = f"step {result.step} changed nothing: a gradient overflowed at loss scale {result.loss_scale:g}"
        elif result.skipped:
            text = (
                f"step {result.step} changed nothing: the gradient norm is {result.grad_norm} and the loss "
                f"{'n/a' if result.loss is None else result.loss}{self.whose()}"
            )
        else:
            text = (
                f"step {result.step}: the loss is {result.loss}; its gradients are finite, so the step was "
                f"taken{self.whose()}"
            )
        of_run = not self._culprits  # gradients that come from no rank's loss
        self.link.event(what, text, severity=severity, step=result.step, of_run=of_run)  # type: ignore[arg-type]
        log.log(logging.ERROR if severity == "error" else logging.WARNING, text)

    def finish(self) -> None:
        """The last step is done: save it if checkpoints are on (and it was sound), and say goodbye."""
        wanted = self.knobs["checkpoint_interval"] or self.knobs["checkpoint_minutes"]
        if self._sound and self.folder is not None and wanted:
            self._saved()
        self.engine.saver.settle()
        self.link.goodbye("finished", self.engine.global_steps)

    def resume(self) -> Path | None:
        """Under --resume: load the newest complete checkpoint of the run that is sound. Returns it."""
        if not self.session.resume or self.folder is None:
            return None
        path = self.engine.resume_newest(self.folder, tell=self._tell_damaged)
        if path is not None:
            self.knobs["lr_factor"] = self.engine.lr_factor
            self._begun_step, self._saved_path = self.engine.global_steps, path
        return path

    def _tell_damaged(self, problem: str) -> None:
        self.link.event("checkpoint", problem, severity="error")

    def forget_saved(self) -> None:
        """The engine's state is no longer that of the newest checkpoint of this step."""
        self._begun_step, self._saved_path = -1, None
        self._due, self._sound, self._unsound = False, True, []

    # ---- commands: see [Note: how ranks agree] -------------------------------------------------------------
    def _apply_all(self, commands: deque[Command]) -> None:
        paused = False
        self.engine.synchronize()
        while commands or paused:
            command = commands.popleft() if commands else self._next_while_paused()
            if command is None:
                continue
            self.link.inbox.mark_applied(command.number)
            if command.name == "pause":
                paused = self._pause(command)
            elif command.name == "resume":
                paused = not self._resume(command)
            else:
                self._apply(command)
                if paused:
                    self.engine.telemetry.enter("paused", self.engine.global_steps, 0)

    def _pause(self, command: Command) -> bool:
        """Whether the run is paused."""
        engine, result = self.engine, {}
        if command.arguments.get("release"):
            if engine.device.type != "cuda":
                self._answer(command, "rejected", "the ranks are on CPUs: there is no GPU memory to release")
                return False
            result = {"released_bytes": sum(engine.comm.gather_objects(engine.parking.park()))}
        self._answer(command, "applied", result=result)
        engine.telemetry.enter("paused", engine.global_steps, 0)
        return True

    def _resume(self, command: Command) -> bool:
        """Whether the run goes on."""
        if not self._brought_back(command):
            return False
        self._answer(command, "applied")
        self.engine.telemetry.enter("step", self.engine.global_steps, 0)
        return True

    def _brought_back(self, command: Command) -> bool:
        """After `pause --release`: everything to the GPUs again, on all ranks or on none."""
        problem = self._unparked()
        if problem:
            self._answer(command, "rejected", problem)
        return not problem

    def _unparked(self) -> str:
        """What is in the way of `_brought_back`, on any rank."""
        parking, problem = self.engine.parking, ""
        if not parking.parked:
            return ""
        try:
            parking.unpark()
        except torch.OutOfMemoryError as error:
            problem = f"rank {self.engine.comm.rank}: {str(error).splitlines()[0]}"
        problems = [found for found in self.engine.comm.gather_objects(problem) if found]
        if problems and not problem:
            parking.park()
        return f"the GPU memory that was released is in use by others: {problems[0]}" if problems else ""

    def _next_while_paused(self) -> Command | None:
        if self.link.inbox.orphaned:
            self._stop(ORPHANED, cannot_save=self._unparked())
        return self.link.inbox.next(PAUSED_POLL_S)

    def _apply(self, command: Command) -> None:
        released = self.engine.parking.parked
        if command.name in ("checkpoint", "stop") and not self._brought_back(command):
            return
        match command.name:
            case "checkpoint":
                self._checkpoint(command)
                if released:
                    self.engine.parking.park()
            case "set":
                self._set(command)
            case "stop":
                self._stop(f"stop asked for by {command.who or 'the keyboard'}", command)
            case _:
                self._answer(command, "rejected", f"{command.name} is not a command that ranks know")

    def _checkpoint(self, command: Command) -> None:
        if self.folder is None:
            self._answer(command, "rejected", "there is no run directory to save into")
        elif self._begun_step == self.engine.global_steps and self._saved():
            self._answer(command, "applied", result={"path": str(self._saved_path), "step": self.engine.global_steps})
        elif not self._save(command):
            self._answer(command, "rejected", self._problem)

    def _set(self, command: Command) -> None:
        """All values of one `set` or none: checked first, then applied."""
        try:
            values = {name: get_knob(name).check(value) for name, value in command.arguments.items()}
        except KnobError as error:
            self._answer(command, "rejected", str(error))
            return
        self.knobs.update(values)
        if "lr_factor" in values:
            self.engine.lr_factor = float(values["lr_factor"])
            self.forget_saved()  # a checkpoint holds the factor
        if "telemetry_hz" in values:
            self.link.hz = float(values["telemetry_hz"])
        if "log_level" in values:
            self.apply_log_level()
        self._answer(command, "applied", result=values)

    def apply_log_level(self) -> None:
        level = str(self.knobs["log_level"]).upper()
        logging.getLogger("runtime").setLevel(level)
        self.link.log_handler.setLevel(level)

    def _stop(self, why: str, command: Command | None = None, cannot_save: str = "") -> None:
        """Save (unless this step is saved), say goodbye, leave."""
        self._problem = cannot_save
        if command is not None and self.folder is not None and not cannot_save:
            self._answer(command, "accepted", f"the checkpoint of step {self.engine.global_steps} is being written")
        saved = not cannot_save and (self.folder is None or self._saved())
        if command is not None:
            self._answer(
                command, "applied", result={"checkpoint": str(self._saved_path) if self._saved_path and saved else None}
            )
        log.info(
            f"stopping at step {self.engine.global_steps}: "
            f"{why}{'' if saved else ' (no checkpoint: ' + self._problem + ')'}"
        )
        self.link.goodbye("stopped", self.engine.global_steps, "" if saved else self._problem)
        raise RunStopped

    # ---- checkpoints ---------------------------------------------------------------------------------------
    _problem = ""

    def _saved(self) -> bool:
        """Whether there is a complete checkpoint of this step: waits for the one under way, or makes one."""
        if self._begun_step == self.engine.global_steps and not self.engine.saver.settle():
            return True
        self._begun_step = -1
        if not self._save():
            return False
        self._problem = self.engine.saver.settle()
        return not self._problem

    def _save(self, command: Command | None = None) -> bool:
        """Begin to save this step under the run; `command` is answered when it is complete. A failure is an event, not
        the end: training goes on with the older checkpoints."""
        assert self.folder is not None
        engine, checkpoints = self.engine, self.engine.config.zerotop.checkpoint
        step = engine.global_steps
        if command is not None:
            self._answer(command, "accepted", f"the checkpoint of step {step} is being written")
        try:
            with engine.telemetry.span("checkpoint"):
                path = engine.saver.begin(
                    self.folder,
                    checkpoint.step_tag(step),
                    engine.client_state,
                    # What a step that is not sound leaves takes no good checkpoint's place.
                    keep=self.knobs["checkpoints_kept"] if self._sound else 0,
                    keep_every=checkpoints.keep_every,
                    on_done=self._teller(step, command),
                )
        except checkpoint.CheckpointError as error:
            self._problem = str(error)
            self._tell_failed(self._problem, step)
            return False
        self._begun_step, self._saved_path = step, path
        return True

    def _teller(self, step: int, command: Command | None) -> Callable[[Outcome], None]:
        """What rank 0 says when a checkpoint is complete, or could not be written; on another thread."""

        def tell(outcome: Outcome) -> None:
            if self.engine.comm.rank != 0:
                return
            if outcome.problem:
                self._tell_failed(outcome.problem, step)
                if command is not None:
                    self._answer(command, "rejected", outcome.problem, step=step)
                return
            for note in outcome.notes:
                self.link.event("checkpoint", note, severity="warning")
            path, blocked_ms = str(outcome.job.final), 1000 * outcome.blocked_s
            self.link.event(
                "checkpoint",
                f"checkpoint at step {step} saved in {outcome.seconds:.1f} s (training waited {blocked_ms:.0f} ms)",
                step=step,
                data={"path": path, "seconds": round(outcome.seconds, 3), "blocked_ms": round(blocked_ms, 1)},
            )
            if command is not None:
                self._answer(command, "applied", result={"path": path, "step": step}, step=step)

        return tell

    def _tell_failed(self, problem: str, step: int) -> None:
        if self.engine.comm.rank == 0:
            self.link.event("checkpoint", f"{problem}; training goes on", severity="warning", step=step)

    def _answer(
        self,
        command: Command,
        state: Any,
        reason: str = "",
        result: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        if self.engine.comm.rank != 0:
            return
        self.link.ack(
            Ack(
                id=command.id,
                number=command.number,
                state=state,
                step=self.engine.global_steps if step is None else step,
                reason=reason,
                result=result or {},
                rank=0,
                wall_s=time.time(),
            )
        )


def _sound(loss: torch.Tensor | float | None) -> bool:
    """A loss that nobody knows is not held against anyone."""
    return loss is None or math.isfinite(loss)
