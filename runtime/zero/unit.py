"""A unit: the parameters that are gathered, reduced and updated together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from runtime.zero.flat import FlatParamGroup


@dataclass(eq=False)
class Unit:
    """One part of the model, as `cut` made it, and its flat buffers."""

    name: str
    modules: list[nn.Module]
    """Whose forward uses the parameters."""
    keep_unsharded: bool
    """The root unit, whose parameters anything may use: gathered from the first forward to the next update."""
    flats: list[FlatParamGroup] = field(default_factory=list)
    """Trained parameters, one flat per dtype."""
    frozen: list[FlatParamGroup] = field(default_factory=list)
    """Parameters that are not trained; stage 3 only."""
    running: int = 0
    """Forwards of its modules that have begun and not ended."""
    unshard_refs: int = 0
    """Scripts that hold it whole: see GatheredParameters."""
    nested: bool = False
    """Another unit was used inside its forward, so it must not be released when that one begins its backward."""

    @property
    def sharded(self) -> list[FlatParamGroup]:
        return [flat for flat in (*self.flats, *self.frozen) if flat.sharded]

    def issue_unshard(self, before: Callable[[FlatParamGroup], None] = lambda flat: None) -> bool:
        """Start the all-gathers of its sharded parameter groups. before: returns when a group's own shard is up to
        date. False where there was nothing to start."""
        issued = False
        for flat in self.sharded:
            if not (flat.is_unsharded or flat.is_unsharding):
                before(flat)
                issued |= flat.issue_unshard()
        return issued

    def unshard(self, before: Callable[[FlatParamGroup], None] = lambda flat: None) -> bool:
        """All-gather the parameters and wait for them. Returns whether an all-gather was started."""
        issued = self.issue_unshard(before)
        for flat in self.sharded:
            flat.wait_for_unshard()
        return issued

    def reshard(self) -> None:
        """Free the parameters; this rank's shards stay."""
        for flat in self.sharded:
            flat.reshard()
