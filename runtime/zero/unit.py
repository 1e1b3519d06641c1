"""A unit: the parameters that are unsharded, reduced and updated together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from runtime.zero.flat import FlatParamGroup


@dataclass(eq=False)
class Unit:
    """One part of the model, as `cut` divides it, and its flat parameter groups."""

    name: str
    modules: list[nn.Module]
    """The modules whose forward uses the parameters."""
    keep_unsharded: bool
    """Whether the unit stays unsharded from the first forward to the next update, because its parameters may be used at
    any time: true of the root unit."""
    flats: list[FlatParamGroup] = field(default_factory=list)
    """Groups of trained parameters, one per dtype."""
    frozen: list[FlatParamGroup] = field(default_factory=list)
    """Groups of parameters that are not trained; stage 3 only."""
    running: int = 0
    """Number of forwards of its modules that are running."""
    first_node: int = 0
    """torch's number of the autograd node that followed when the outermost of them began."""
    unshard_refs: int = 0
    """Number of contexts that keep the unit unsharded: see GatheredParameters."""
    nested: bool = False
    """Whether another unit was used inside this one's forward, so this one must stay unsharded during the backward of
    that one."""

    @property
    def sharded(self) -> list[FlatParamGroup]:
        """The groups that are kept as shards, trained or not."""
        return [flat for flat in (*self.flats, *self.frozen) if flat.sharded]

    def issue_unshard(self, before: Callable[[FlatParamGroup], None] = lambda flat: None) -> bool:
        """Start the all-gathers of its sharded groups. before: waits until a group's shard is up to date. Returns
        whether any all-gather was started."""
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
        """Free the full parameters; this rank's shards stay."""
        for flat in self.sharded:
            flat.reshard()
