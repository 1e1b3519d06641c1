"""What must hold after every fault: complete checkpoints are sound, `latest` is right, losses are the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint.format.folder import LATEST, complete_checkpoints
from runtime.checkpoint.format.manifest import MANIFEST, CheckpointError, read_manifest, verify
from tests.faults.chaos.run import Run


@dataclass
class Checkpoints:
    """The complete checkpoints of a run, and those that were damaged on purpose."""

    folder: Path
    damaged: set[tuple[str, int]] = field(default_factory=set)
    """Tag and inode of the folder: one that was written again is another."""

    def damage(self, path: Path) -> None:
        self.damaged.add((path.name, path.stat().st_ino))

    def is_damaged(self, path: Path) -> bool:
        try:
            return (path.name, path.stat().st_ino) in self.damaged
        except FileNotFoundError:
            return False

    def newest_sound(self) -> tuple[int, int]:
        """(number, step) of the newest that was not damaged on purpose; (0, 0) where there is none."""
        sound = [
            (found.number, found.step) for found in complete_checkpoints(self.folder) if not self.is_damaged(found.path)
        ]
        return max(sound, default=(0, 0))

    def problems(self) -> list[str]:
        """Complete checkpoints that are not what was written, although nobody damaged them; a `latest` that is
        wrong."""
        found = []
        for path in sorted(self.folder.glob("step-*")):
            if self.is_damaged(path):
                continue
            try:
                verify(path, read_manifest(path))
            except CheckpointError as error:
                if path.exists() and (path / MANIFEST).exists():  # it was not pruned meanwhile
                    found.append(str(error))
        latest = self.folder / LATEST
        if latest.exists() and not (self.folder / latest.read_text().strip() / MANIFEST).exists():
            tag = latest.read_text().strip()
            if not (self.folder / tag / MANIFEST).exists():  # it may have moved on between the two looks
                found.append(f"latest names {tag}, which is not complete")
        return found


def different_losses(run: Run, reference: dict[int, float | None]) -> list[str]:
    """Steps whose loss is not the reference's, to the last bit."""
    wrong = [(step, loss) for step, loss in run.losses() if loss != reference[step]]
    return [f"step {step}: loss {loss!r}, undisturbed {reference[step]!r}" for step, loss in wrong[:3]]
