"""Checkpoints that the run makes by itself: at intervals, on command, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime import checkpoint
from runtime.checkpoint.checkpointer import Checkpointer
from runtime.checkpoint.content.registered import ScriptState
from runtime.checkpoint.saving.writer_handle import Outcome
from runtime.engine.session import Session
from runtime.state.train_state import TrainState
from runtime.wire.startnote import tell_start

WAIT_S = 10.0
"""Seconds that training waits for the previous save when the next checkpoint is due."""

Answer = Callable[[str, str, Mapping[str, Any], int], None]
"""Callback (state, reason, result, step) that answers a `checkpoint` command."""


class Autosave:
    """Automatic and keyboard checkpoints of one engine, under `zerotop launch`. Other scripts save by themselves."""

    def __init__(
        self,
        state: TrainState,
        checkpointer: Checkpointer,
        script: ScriptState,
        session: Session,
        knobs: Mapping[str, Any],
    ) -> None:
        self._state, self._checkpointer, self._script = state, checkpointer, script
        self._link, self._knobs = session.link, knobs
        self.folder = _folder(session, state.config.zerotop.checkpoint.folder)
        """Folder of the checkpoints; None outside a run."""
        self.problem = ""
        """Why the last save failed."""
        self.path: Path | None = None
        """Path of the checkpoint whose save was started last."""
        self._begun_step = -1
        """Optimizer step of the checkpoint whose save was started last; the same on all ranks."""
        self._due = False  # whether an automatic checkpoint is due; decided on rank 0
        self._due_step = 0
        """The step at whose end it is due, at the earliest."""
        self._deferred = False  # whether the event about its deferral has been sent
        self._last_due_s = time.monotonic()

    # ---- automatic checkpoints ---------------------------------------------------------------------------------------
    @property
    def enabled(self) -> bool:
        """Whether automatic checkpoints are configured."""
        return self.folder is not None and bool(self._knobs["checkpoint_interval"] or self._knobs["checkpoint_minutes"])

    def is_due(self, step: int) -> bool:
        """Rank 0, before a boundary: whether to save at the end of `step`. Waits WAIT_S seconds for a save that is
        still running, then defers the next until it is done."""
        if self.folder is None:
            return False
        now = time.monotonic()
        interval, minutes = self._knobs["checkpoint_interval"], self._knobs["checkpoint_minutes"]
        if (interval and step % interval == 0) or (minutes and now - self._last_due_s >= 60 * minutes):
            self._due_step = step if not self._due else self._due_step
            self._due, self._last_due_s = True, now
        if not (interval or minutes):
            self._due = False
        if self._due and self._checkpointer.busy and not self._deferred:
            self._deferred = not self._checkpointer.wait_briefly(WAIT_S)
            if self._deferred:
                text = f"the checkpoint of step {step} is deferred: the previous save is still running"
                self._link.event("checkpoint", text, severity="warning", step=step)
        return self._due and not self._checkpointer.busy

    def can_begin(self) -> bool:
        """Rank 0, at the boundary: whether a checkpoint is due and no save is running."""
        reached = self._state.counters.global_steps >= self._due_step
        return self._due and reached and not self._checkpointer.busy

    def save_due(self, keeps_old: bool) -> None:
        """Start the checkpoint that rank 0 has found due. Collective."""
        self._due = self._deferred = False
        self.begin(keeps_old)

    def prepare(self) -> None:
        """Allocate memory and start the writer ahead of the first automatic checkpoint."""
        if self.enabled:
            self._checkpointer.prepare()

    # ---- collective: every rank at the same step ------------------------------------------------------------------
    def begin(self, keeps_old: bool, answer: Answer | None = None) -> bool:
        """Start saving this step; `answer` is called when it is complete. keeps_old: delete no older checkpoint for it.
        Returns whether it has started; a failure is reported as an event, and training continues."""
        assert self.folder is not None
        state, step = self._state, self._state.counters.global_steps
        try:
            with state.comm.telemetry.span("checkpoint"):
                path = self._checkpointer.begin(
                    self.folder,
                    checkpoint.step_tag(step),
                    self._script.client_state,
                    keep=0 if keeps_old else self._knobs["checkpoints_kept"],
                    keep_every=state.config.zerotop.checkpoint.keep_every,
                    on_done=self._reporter(step, answer),
                )
        except checkpoint.CheckpointError as error:
            self.problem = str(error)
            self._report_failure(self.problem, step)
            return False
        self._begun_step, self.path = step, path
        return True

    def save(self, keeps_old: bool) -> bool:
        """Save this step, or wait for its save if one has been started. Returns whether it is complete."""
        if self._begun_step == self._state.counters.global_steps and not self._checkpointer.wait_for_save():
            return True
        self._begun_step = -1
        if not self.begin(keeps_old):
            return False
        self.problem = self._checkpointer.wait_for_save()
        return not self.problem

    def has_this_step(self, keeps_old: bool) -> bool:
        """Whether a save of this step has been started before; waits until it is complete."""
        return self._begun_step == self._state.counters.global_steps and self.save(keeps_old)

    def wait_for_save(self) -> None:
        """Wait for the running save."""
        self._checkpointer.wait_for_save()

    def resume(self) -> Path | None:
        """Load the newest complete, undamaged checkpoint of the run. Returns its path, or None."""
        if self.folder is None:
            return None
        tell_start("reading the newest checkpoint")
        path = self._checkpointer.load_newest(self.folder, tell=self._report_damaged)
        if path is not None:
            self._begun_step, self.path = self._state.counters.global_steps, path
        return path

    def forget(self) -> None:
        """Forget that this step was saved, because its training state has changed since."""
        self._begun_step, self.path, self._due = -1, None, False

    def newest(self) -> Path | None:
        """The newest checkpoint of the run, else the one that the script saved or loaded last."""
        found = checkpoint.newest(self.folder) if self.folder is not None else None
        return found or self._script.last_checkpoint

    # ---- reporting ------------------------------------------------------------------------------------------------
    def _reporter(self, step: int, answer: Answer | None) -> Callable[[Outcome], None]:
        """The on_done callback, which reports the outcome on rank 0; it runs on another thread."""

        def report(outcome: Outcome) -> None:
            if self._state.comm.rank != 0:
                return
            if outcome.problem:
                self._report_failure(outcome.problem, step)
                if answer is not None:
                    answer("rejected", outcome.problem, {}, step)
                return
            for note in outcome.notes:
                self._link.event("checkpoint", note, severity="warning")
            path, blocked_ms = str(outcome.job.final), 1000 * outcome.blocked_s
            self._link.checkpoint_saved(step, path, seconds=outcome.seconds, blocked_ms=blocked_ms)
            if answer is not None:
                answer("applied", "", {"path": path, "step": step}, step)

        return report

    def _report_failure(self, problem: str, step: int) -> None:
        if self._state.comm.rank == 0:
            self._link.event("checkpoint", f"{problem}; training continues", severity="warning", step=step)

    def _report_damaged(self, problem: str) -> None:
        self._link.event("checkpoint", problem, severity="error")


def _folder(session: Session, chosen: str | None) -> Path | None:
    """The folder of this session's checkpoints: a subfolder of the first engine's for later engines of the process."""
    run = session.run
    if session.folder is None or run is None:
        return None
    folder = session.folder / "checkpoints"
    if chosen:
        folder = Path(run.config_folder, Path(chosen).expanduser()) / run.name
    return folder if session.number == 1 else folder / f"engine-{session.number}"
