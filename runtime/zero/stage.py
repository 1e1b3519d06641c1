"""What a ZeRO stage is: the answers to a few questions, asked by the one engine. (arXiv 1910.02054, section 5)"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.plan.layout import Layout


@dataclass(frozen=True)
class StagePolicy:
    stage: int
    own_states: bool
    """Masters and optimizer states exist for the rank's own range only."""
    own_gradients: bool
    """Gradients are reduced as each unit's backward ends, and only the own range is kept. Otherwise they stay whole
    until the boundary."""
    own_parameters: bool
    """Parameters, too, are kept as the own range only, and gathered for the time of their use."""

    def state_range(self, layout: Layout, rank: int) -> tuple[int, int]:
        """The elements [start, end) of a flat buffer whose states this rank holds and updates."""
        return layout.range(rank) if self.own_states else (0, layout.numel)


STAGES = {
    0: StagePolicy(0, own_states=False, own_gradients=False, own_parameters=False),
    1: StagePolicy(1, own_states=True, own_gradients=False, own_parameters=False),
    2: StagePolicy(2, own_states=True, own_gradients=True, own_parameters=False),
    3: StagePolicy(3, own_states=True, own_gradients=True, own_parameters=True),
}


def policy_for(stage: int, accumulate_locally: bool) -> StagePolicy:
    """`accumulate_locally`: whole gradients until the boundary at every stage (zerotop.accumulate: "local")."""
    return replace(STAGES[stage], own_gradients=False) if accumulate_locally else STAGES[stage]
