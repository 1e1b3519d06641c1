"""What a ZeRO stage is: the answers to a few questions, asked by the one engine. (arXiv 1910.02054, section 5)"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.zero.layout import Layout


@dataclass(frozen=True)
class StagePolicy:
    stage: int
    own_states: bool
    """Masters and optimizer states exist for the rank's own range only."""
    reduce_every_micro_step: bool
    """Gradients are reduced as each unit's backward ends, and only the own range is kept. Otherwise they stay whole
    until the boundary."""

    @property
    def own_gradients(self) -> bool:
        """Only the own range's accumulated gradient outlives a unit's backward."""
        return self.reduce_every_micro_step

    def state_range(self, layout: Layout, rank: int) -> tuple[int, int]:
        """The elements [start, end) of a flat buffer whose states this rank holds and updates."""
        return layout.range(rank) if self.own_states else (0, layout.numel)


STAGES = {
    0: StagePolicy(0, own_states=False, reduce_every_micro_step=False),
    1: StagePolicy(1, own_states=True, reduce_every_micro_step=False),
    2: StagePolicy(2, own_states=True, reduce_every_micro_step=True),
}
