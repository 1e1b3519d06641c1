"""A unit: the parameters that are gathered, reduced and updated together."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from runtime.zero.flat import Flat


@dataclass(eq=False)
class Unit:
    """One part of the model, as `cut` made it, and its flat buffers."""

    name: str
    modules: list[nn.Module]
    """Whose forward uses the parameters."""
    stays: bool
    """The root unit, whose parameters anything may use: gathered from the first forward to the next update."""
    flats: list[Flat] = field(default_factory=list)
    """Trained parameters, one flat per dtype."""
    frozen: list[Flat] = field(default_factory=list)
    """Parameters that are not trained; stage 3 only."""
    running: int = 0
    """Forwards of its modules that have begun and not ended."""
    asked_for: int = 0
    """Scripts that hold it whole: see GatheredParameters."""
    nested: bool = False
    """Another unit was used inside its forward, so it must not be released when that one begins its backward."""

    @property
    def sharded(self) -> list[Flat]:
        return [flat for flat in (*self.flats, *self.frozen) if flat.sharded]

    def issue_gather(self) -> bool:
        """False where there was nothing to start."""
        issued = [flat.issue_gather() for flat in self.sharded]
        return any(issued)

    def gather(self) -> bool:
        """Returns with the parameters in place; whether a gather was started for it."""
        issued = self.issue_gather()
        for flat in self.sharded:
            flat.finish_gather()
        return issued

    def release(self) -> None:
        for flat in self.sharded:
            flat.release()
