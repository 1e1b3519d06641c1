"""What a ZeRO stage is: the answers to a few questions, asked by the one engine. (arXiv 1910.02054, section 5)"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.plan.layout import Layout


@dataclass(frozen=True)
class StagePolicy:
    stage: int
    shards_states: bool
    """Masters and optimizer states exist for the rank's own shard only."""
    shards_gradients: bool
    """Gradients are reduced as each unit's backward ends, and only the own shard is kept. Otherwise they stay whole
    until the boundary."""
    shards_parameters: bool
    """Parameters, too, are kept as the own shard only, and gathered for the time of their use."""

    def state_shard(self, layout: Layout, rank: int) -> tuple[int, int]:
        """The elements [start, end) of a flat buffer whose states this rank holds and updates."""
        return layout.shard(rank) if self.shards_states else (0, layout.numel)


STAGES = {
    0: StagePolicy(0, shards_states=False, shards_gradients=False, shards_parameters=False),
    1: StagePolicy(1, shards_states=True, shards_gradients=False, shards_parameters=False),
    2: StagePolicy(2, shards_states=True, shards_gradients=True, shards_parameters=False),
    3: StagePolicy(3, shards_states=True, shards_gradients=True, shards_parameters=True),
}


def policy_for(stage: int, accumulate_locally: bool) -> StagePolicy:
    """`accumulate_locally`: whole gradients until the boundary at every stage (zerotop.accumulate: "local")."""
    return replace(STAGES[stage], shards_gradients=False) if accumulate_locally else STAGES[stage]
