"""Checkpoints of the run itself: at intervals, on command, at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime import checkpoint
from runtime.checkpoint.checkpointer import Checkpointer
from runtime.checkpoint.registered import ScriptState
from runtime.checkpoint.writer_process import Outcome
from runtime.engine.session import Session
from runtime.state.train_state import TrainState

WAIT_S = 10.0
"""How long training waits at most for the checkpoint before, when the next one is due."""

Answer = Callable[[str, str, Mapping[str, Any], int], None]
"""(state, reason, result, step): what a command for a checkpoint hears."""


class Autosave:
    """Automatic and keyboard checkpoints of one engine. They need a run; a script without one saves by itself."""

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
        """Where the checkpoints go; None without a run."""
        self.problem = ""
        """Why the last one could not be made."""
        self.path: Path | None = None
        """Of the checkpoint that was begun last."""
        self._begun_step = -1
        """The step whose checkpoint was begun last: the same on all ranks."""
        self._due = False  # an automatic checkpoint is; rank 0 decides
        self._deferred = False  # and the event that says so has been sent
        self._last_due_s = time.monotonic()

    # ---- automatic ones --------------------------------------------------------------------------------------------
    @property
    def wanted(self) -> bool:
        """Whether there are automatic checkpoints."""
        return self.folder is not None and bool(self._knobs["checkpoint_interval"] or self._knobs["checkpoint_minutes"])

    def is_due(self) -> bool:
        """Rank 0: at the step that is about to end. A checkpoint that is still being written is waited for, not long;
        then the next is deferred until it is done."""
        if self.folder is None:
            return False
        step, now = self._state.counters.global_steps + 1, time.monotonic()
        interval, minutes = self._knobs["checkpoint_interval"], self._knobs["checkpoint_minutes"]
        if (interval and step % interval == 0) or (minutes and now - self._last_due_s >= 60 * minutes):
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
        """Rank 0, at the boundary: whether the checkpoint that is due can begin."""
        return self._due and not self._checkpointer.busy

    def save_due(self, keeps_old: bool) -> None:
        """All ranks: rank 0 has said that it is due."""
        self._due = self._deferred = False
        self.begin(keeps_old)

    def prepare(self) -> None:
        """Start what the first automatic checkpoint needs."""
        if self.wanted:
            self._checkpointer.prepare()

    # ---- all of them: every rank at the same step ------------------------------------------------------------------
    def begin(self, keeps_old: bool, answer: Answer | None = None) -> bool:
        """Begin to save this step; `answer` hears when it is complete. keeps_old: no older checkpoint is deleted for
        it. Returns whether it has begun; a failure is an event, not the end: training goes on with the older ones."""
        assert self.folder is not None
        state, step = self._state, self._state.counters.global_steps
        if answer is not None:
            answer("accepted", f"the checkpoint of step {step} is being written", {}, step)
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
        """Whether there is a complete checkpoint of this step: waits for the one that is being written, or makes
        one."""
        if self._begun_step == self._state.counters.global_steps and not self._checkpointer.settle():
            return True
        self._begun_step = -1
        if not self.begin(keeps_old):
            return False
        self.problem = self._checkpointer.settle()
        return not self.problem

    def has_this_step(self, keeps_old: bool) -> bool:
        """Whether a checkpoint of this step was begun before, and is complete now."""
        return self._begun_step == self._state.counters.global_steps and self.save(keeps_old)

    def settle(self) -> None:
        """Wait for what is being written."""
        self._checkpointer.settle()

    def resume(self) -> Path | None:
        """Load the newest complete checkpoint of the run that is sound. Returns it."""
        if self.folder is None:
            return None
        path = self._checkpointer.load_newest(self.folder, tell=self._report_damaged)
        if path is not None:
            self._begun_step, self.path = self._state.counters.global_steps, path
        return path

    def forget(self) -> None:
        """The training state is no longer that of the newest checkpoint of this step."""
        self._begun_step, self.path, self._due = -1, None, False

    def newest(self) -> Path | None:
        """The newest checkpoint of the run, else what the script saved or loaded last."""
        found = checkpoint.newest(self.folder) if self.folder is not None else None
        return found or self._script.last_checkpoint

    # ---- what is said of them --------------------------------------------------------------------------------------
    def _reporter(self, step: int, answer: Answer | None) -> Callable[[Outcome], None]:
        """What rank 0 says when a checkpoint is complete, or could not be written; on another thread."""

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
            self._link.event("checkpoint", f"{problem}; training goes on", severity="warning", step=step)

    def _report_damaged(self, problem: str) -> None:
        self._link.event("checkpoint", problem, severity="error")


def _folder(session: Session, chosen: str | None) -> Path | None:
    """A later engine of the process has a folder inside the first one's."""
    run = session.run
    if session.folder is None or run is None:
        return None
    folder = session.folder / "checkpoints"
    if chosen:
        folder = Path(run.config_folder, Path(chosen).expanduser()) / run.name
    return folder if session.number == 1 else folder / f"engine-{session.number}"
