"""A ZeRO stage as a policy: whether states, gradients and parameters are sharded. (arXiv 1910.02054, section 5)"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.plan.layout import Layout


@dataclass(frozen=True)
class StagePolicy:
    """What a rank keeps only its shard of."""

    stage: int
    shards_states: bool
    """Whether a rank has masters and optimizer states for its shard only."""
    shards_gradients: bool
    """Whether gradients are reduced when each unit's backward ends, and only the rank's shard is kept. Otherwise full
    gradients accumulate until the boundary."""
    shards_parameters: bool
    """Whether a rank keeps only its shard of the parameters, which are unsharded for use."""

    def state_shard(self, layout: Layout, rank: int) -> tuple[int, int]:
        """[start, end) the elements of a flat buffer whose masters and optimizer states `rank` has and updates."""
        return layout.shard(rank) if self.shards_states else (0, layout.numel)


STAGES = {
    0: StagePolicy(0, shards_states=False, shards_gradients=False, shards_parameters=False),
    1: StagePolicy(1, shards_states=True, shards_gradients=False, shards_parameters=False),
    2: StagePolicy(2, shards_states=True, shards_gradients=True, shards_parameters=False),
    3: StagePolicy(3, shards_states=True, shards_gradients=True, shards_parameters=True),
}


def policy_for(stage: int, accumulate_locally: bool) -> StagePolicy:
    """The policy of a ZeRO stage. accumulate_locally: whether full gradients accumulate until the boundary at every
    stage (zerotop.accumulate "local")."""
    return replace(STAGES[stage], shards_gradients=False) if accumulate_locally else STAGES[stage]
