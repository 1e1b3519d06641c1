"""Commands for a trainer that is not ours: which ones it can obey, and how its ranks obey them at the same step.

[Note: how foreign ranks agree]
Our engine's ranks agree on commands in the all-reduce of each step; another trainer has no such collective, and a
collective of our own would change what it does. But its ranks are in step, because they reduce gradients: when rank 0
is at the boundary of step s, no other rank can be past the boundary of step s + 1, since that takes rank 0's gradients
of step s + 1. So rank 0 writes "commands up to number n apply at step s + 2" into a file in the run's private folder
before it goes on. Whoever comes to the boundary of step s + 2 has reduced gradients with rank 0 since, and finds the
note. The hosts of GPUs launch steps before they are computed, so there "at the boundary" means no more than that the
device has finished the step RUN_AHEAD steps before (scalars.Pace sees to it), and commands apply so many steps later.
A rank that finds the note too late (ranks that never synchronise) applies the commands at once.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.config.knobs import KnobError, get_knob
from runtime.process.atomic_file import replace_text
from runtime.telemetry.null import NullTelemetry
from runtime.telemetry.publisher import Telemetry
from runtime.wire.messages import Ack, Command

log = logging.getLogger("runtime.watch")

AHEAD = 2
"""Steps from the one at which rank 0 reads a command to the one at which all ranks apply it, where no host runs ahead
of its device. See the note."""
PAUSED_POLL_S = 5.0
KNOBS_OF_WATCHERS = ("lr_factor", "telemetry_hz", "log_level")
"""The settings of runtime.config.knobs that mean something to every trainer that is not ours; log_interval does to
some."""
NOT_HERE = "not possible with this trainer"


class CheckpointFailed(Exception):
    """The trainer could not save. The message is for the user."""


@dataclass
class Controls:
    """What a trainer can be asked for at a step boundary. A field that is None is not possible with it."""

    save: Callable[[], str | None] | None = None
    """Saves a checkpoint on all ranks and returns its path, or returns None if the trainer saves a little later and
    then calls `Watcher.saved`. Raises CheckpointFailed."""
    stop: Callable[[], None] | None = None
    """Asks the trainer to end its loop, after this step."""
    optimizers: Sequence[Any] = ()
    """Those whose learning rate `set lr_factor` changes."""
    can_pause: bool = True
    can_set: bool = True
    log_interval: int | None = None
    """Steps between two logs of the trainer's own."""
    set_log_interval: Callable[[int], None] | None = None
    """Changes it."""
    stop_saves: bool = False
    """Whether `stop` lets the trainer save by itself; otherwise `save` is called before it."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Command -> why it is not possible, and what would make it so."""

    @property
    def knobs(self) -> tuple[str, ...]:
        """The settings that this trainer obeys."""
        return KNOBS_OF_WATCHERS + (("log_interval",) if self.set_log_interval is not None else ())

    def impossible(self) -> dict[str, str]:
        """Command -> why this trainer can't obey it, for those that it can't."""
        missing = {
            "checkpoint": self.save is None,
            "stop": self.stop is None,
            "pause": not self.can_pause,
            "resume": not self.can_pause,
            "set": not self.can_set,
            "profile": True,
            "memory-snapshot": True,
        }
        return {
            name: f"{NOT_HERE}: {self.reasons[name]}" if name in self.reasons else NOT_HERE
            for name, absent in missing.items()
            if absent
        }


class Agreement:
    """The note that rank 0 leaves for the others: see [Note: how foreign ranks agree]."""

    def __init__(self, folder: Path, attempt: int, world_size: int, run_ahead: int = 0) -> None:
        """run_ahead: steps that a rank's host may be ahead of its device."""
        self._path = folder / f"commands-at-{attempt}.json"
        self._ahead = AHEAD + run_ahead
        self._alone = world_size == 1
        self._stamp = 0
        self._number, self._step = 0, 0

    def propose(self, number: int, step: int) -> None:
        """Rank 0, at the end of `step`: commands up to `number` apply some steps later."""
        self._number, self._step = number, step if self._alone else step + self._ahead
        if not self._alone:
            replace_text(self._path, json.dumps({"number": self._number, "step": self._step}))

    def look(self) -> None:
        """Another rank: read the note if it is new."""
        try:
            stamp = os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        note = json.loads(self._path.read_text())
        self._number, self._step = int(note["number"]), int(note["step"])

    def due(self, step: int) -> int:
        """Number up to which commands apply at the end of `step`; 0 if none do."""
        return self._number if self._number and step >= self._step else 0

    def done(self) -> None:
        """The commands of the note have been applied."""
        self._number = 0

    @property
    def open(self) -> bool:
        """Whether a note has been left and not been acted upon."""
        return self._number > 0


class WatcherControl:
    """Applies the commands of one run to one rank of a trainer that is not ours."""

    def __init__(
        self,
        link: Telemetry | NullTelemetry,
        rank: int,
        agreement: Agreement,
        controls: Controls,
    ) -> None:
        self._link, self._rank, self._agreement, self.controls = link, rank, agreement, controls
        self.lr_factor = 1.0
        self._saving: Command | None = None
        self._announced = -1
        """The step of the newest checkpoint of which the run was told."""
        self.stop_asked = False
        """Whether the loop has been asked to end."""
        self._unsubscribe: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Make `set lr_factor` act on the optimizers."""
        for optimizer in self.controls.optimizers:
            self._scale_learning_rate(optimizer)

    # ---- the boundary ----------------------------------------------------------------------------------------------
    def at_boundary(self, step: int) -> None:
        """Apply what is due at the end of optimizer step `step`; waits here while the run is paused."""
        inbox = self._link.inbox
        if self._rank == 0 and inbox.waiting() and not self._agreement.open:
            self._agreement.propose(inbox.newest_number(), step)
        elif self._rank != 0:
            self._agreement.look()
        if up_to := self._agreement.due(step):
            self._agreement.done()
            for command in inbox.take_up_to(up_to):
                self._apply(command, step)
        if inbox.orphaned and not self.stop_asked and self.controls.stop is not None:
            log.warning(f"the supervisor is gone: the trainer is asked to stop after step {step}")
            self._stop(step)

    def _apply(self, command: Command, step: int) -> None:
        if why := self.controls.impossible().get(command.name):
            self._answer(command, "rejected", step, why)
            return
        match command.name:
            case "pause":
                self._pause(command, step)
            case "resume":
                self._answer(command, "rejected", step, "the run is not paused")
            case "checkpoint":
                self._checkpoint(command, step)
            case "stop":
                self._answer(command, "accepted", step, "the trainer has been asked to stop")
                self._stop(step)
            case "set":
                self._set(command, step)
            case _:
                self._answer(command, "rejected", step, f"{command.name} is {NOT_HERE}")

    def _pause(self, command: Command, step: int) -> None:
        if command.arguments.get("release"):
            self._answer(command, "rejected", step, f"pause --release is {NOT_HERE}: its memory is not ours to move")
            return
        self._answer(command, "applied", step)
        phase = self._link.phase
        self._link.enter("paused", step, 0)
        while not self._link.inbox.orphaned:
            given = self._link.inbox.next(PAUSED_POLL_S)
            if given is None:
                continue
            if given.name == "resume":
                self._answer(given, "applied", step)
                break
            if given.name == "pause":
                self._answer(given, "rejected", step, "the run is paused already")
                continue
            self._apply(given, step)
            if self.stop_asked:
                break
        self._link.enter(phase, step + 1, 0)

    def _checkpoint(self, command: Command, step: int) -> None:
        assert self.controls.save is not None
        if self._saving is not None:
            self._answer(command, "rejected", step, "a checkpoint is being written already")
            return
        self._answer(command, "accepted", step, f"the checkpoint of step {step} is being written")
        self._saving = command
        if problem := self._save(step):
            self._saving = None
            self._answer(command, "rejected", step, problem)

    def _save(self, step: int) -> str:
        """Save now; why that failed, or empty."""
        assert self.controls.save is not None
        phase = self._link.phase
        self._link.enter("checkpoint", step, 0)
        began = time.monotonic()
        try:
            path = self.controls.save()
        except Exception as error:  # the training goes on without this checkpoint
            return str(error) if isinstance(error, CheckpointFailed) else f"{type(error).__name__}: {error}"
        finally:
            self._link.enter(phase, step + 1, 0)
        if path is not None:
            if self._announced != step:  # by the function itself
                self.announce(path, step, time.monotonic() - began)
            self.saved(path, step)
        return ""

    def announce(self, path: str, step: int, seconds: float, blocked_ms: float | None = None) -> None:
        """Rank 0 tells the run of a complete checkpoint."""
        self._announced = step
        if self._rank == 0:
            waited = seconds * 1e3 if blocked_ms is None else blocked_ms
            self._link.checkpoint_saved(step, path, seconds=seconds, blocked_ms=waited)

    def saved(self, path: str, step: int) -> None:
        """The trainer has saved a checkpoint, asked for or not."""
        command, self._saving = self._saving, None
        if command is not None:
            self._answer(command, "applied", step, result={"path": path, "step": step})

    def _stop(self, step: int) -> None:
        """Save, if that is possible and the trainer does not do it itself, and let the loop end: on all ranks alike,
        also if one of them could not save."""
        assert self.controls.stop is not None
        self.stop_asked = True
        if self.controls.save is not None and not self.controls.stop_saves and (problem := self._save(step)):
            text = f"stopping at step {step} without a checkpoint: {problem}"
            self._link.event("checkpoint", text, severity="warning", step=step)
        self.controls.stop()

    def _set(self, command: Command, step: int) -> None:
        """All values, or none."""
        values = {}
        for name, given in command.arguments.items():
            try:
                values[name] = get_knob(name).check(given)
            except KnobError as error:
                self._answer(command, "rejected", step, str(error))
                return
            if name not in self.controls.knobs:
                reason = f"{name} is {NOT_HERE}; {', '.join(self.controls.knobs)} are"
                self._answer(command, "rejected", step, reason)
                return
            if name == "lr_factor" and not self.controls.optimizers:
                self._answer(command, "rejected", step, f"lr_factor is {NOT_HERE}: watch() was given no optimizer")
                return
        if "lr_factor" in values:
            self.lr_factor = float(values["lr_factor"])
        if "telemetry_hz" in values:
            self._link.hz = float(values["telemetry_hz"])
        if "log_level" in values:
            self._link.log_handler.setLevel(str(values["log_level"]).upper())
        if "log_interval" in values and self.controls.set_log_interval is not None:
            self.controls.log_interval = int(values["log_interval"])
            self.controls.set_log_interval(self.controls.log_interval)
        self._answer(command, "applied", step, result=values)

    def _answer(
        self, command: Command, state: Any, step: int, reason: str = "", result: dict[str, Any] | None = None
    ) -> None:
        if self._rank == 0:
            self._link.ack(
                Ack(id=command.id, number=command.number, state=state, step=step, reason=reason, result=result or {})
            )

    # ---- the learning rate -----------------------------------------------------------------------------------------
    def _scale_learning_rate(self, optimizer: Any) -> None:
        """Multiply the learning rate for the length of each step only: schedulers read and write their own values in
        the groups, and must find them there."""
        if not hasattr(optimizer, "register_step_pre_hook"):
            return
        kept: list[Any] = []

        def before(stepping: Any, *_given: Any) -> None:
            if self.lr_factor != 1.0:
                kept[:] = [group["lr"] for group in stepping.param_groups]
                for group in stepping.param_groups:
                    group["lr"] = group["lr"] * self.lr_factor

        def after(stepping: Any, *_given: Any) -> None:
            for group, lr in zip(stepping.param_groups, kept, strict=False):
                group["lr"] = lr
            kept.clear()

        handles = (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
        self._unsubscribe += [handle.remove for handle in handles]

    def close(self) -> None:
        """Remove the hooks."""
        for remove in self._unsubscribe:
            remove()
        self._unsubscribe.clear()
