"""The command `memory-snapshot`: records some optimizer steps on all ranks, then writes their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.diagnose.memory_snapshot import MemorySnapshot
from runtime.engine.activation_samples import unit_activations
from runtime.engine.session import Session
from runtime.host.ledger import memory_message
from runtime.state.train_state import TrainState
from runtime.wire.messages import Command, Memory

MEMORY_FOLDER = "memory"
"""In the run directory: memory/step-S/rank-R.json."""


class MemorySnapshots:
    """The memory snapshots of one engine. Methods are called by all ranks at the same step."""

    def __init__(self, state: TrainState, session: Session) -> None:
        self._state, self._session = state, session
        self._recording: MemorySnapshot | None = None
        self._due_step = 0
        self.command: Command | None = None
        """The command that is being carried out."""

    @property
    def is_due(self) -> bool:
        """Whether the steps to record are over."""
        return self.command is not None and self._state.counters.global_steps >= self._due_step

    def begin(self, command: Command, steps: int) -> str:
        """Record the next `steps` steps; 0 records nothing and is due at once. Returns why not; empty if it does."""
        if self._session.folder is None:
            return "this engine has no run directory to write into"
        if self.command is not None:
            return "a memory snapshot is being recorded already"
        state, session = self._state, self._session
        self._recording = MemorySnapshot(
            unit_activations(state, session.recorder), state.device, _memory(state, session)
        )
        self.command, self._due_step = command, state.counters.global_steps + steps
        if steps:
            self._recording.begin()
        return ""

    def finish(self) -> tuple[Path, str]:
        """Write the files of all ranks. Returns their folder, and the error of the first rank that failed, else
        empty. Collective."""
        recording, self._recording, self.command = self._recording, None, None
        assert recording is not None and self._session.folder is not None
        rank, step = self._state.comm.rank, self._state.counters.global_steps
        folder = self._session.folder / MEMORY_FOLDER / f"step-{step}"
        problem = ""
        try:
            recording.write(folder, rank, step)
        except (OSError, RuntimeError) as error:
            problem = f"rank {rank}: {error}"
        problems = [found for found in self._state.comm.gather_objects(problem) if found]
        return folder, problems[0] if problems else ""


def _memory(state: TrainState, session: Session) -> Callable[[], Memory]:
    return session.link.memory_source or (lambda: memory_message(state.comm.rank, state.ledger, state.device))
