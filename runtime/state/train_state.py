"""`TrainState`: all that an optimizer step changes, in one place. Checkpoints, commands and the release of GPU memory
take it as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from runtime.comm import Comm
from runtime.comm.transfer import Transfers
from runtime.config import Resolved
from runtime.host.ledger import Ledger
from runtime.offload.download import GradOffload
from runtime.optim.optimizer import ZeroOptimizer
from runtime.optim.shard_optimizer import Hyper, ShardOptimizer
from runtime.optim.updates import Updates
from runtime.state.accumulation import Accumulation
from runtime.state.loss_scale import Scaler
from runtime.zero.flat import FlatParamGroup
from runtime.zero.full import FullModel
from runtime.zero.pool import BufferPool
from runtime.zero.reduce import GradReducer
from runtime.zero.script_changes import ScriptChanges
from runtime.zero.stage import StagePolicy
from runtime.zero.unit import Unit
from runtime.zero.unshard import Unsharder


@dataclass
class Counters:
    """How far a training is."""

    global_steps: int = 0
    """Optimizer steps, skipped ones included: what progress and checkpoints count."""
    optimizer_steps: int = 0
    """Updates really taken: Adam's bias correction counts these."""
    foreign_steps: int = 0
    """Steps of a loaded checkpoint whose optimizer states were left behind."""
    lr_factor: float = 1.0
    """The run's factor on every learning rate (`zerotop set lr_factor=...`)."""

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that changed nothing, because a gradient was not finite."""
        return self.global_steps - self.optimizer_steps - self.foreign_steps


_under_way: dict[Updates, TrainState] = {}
"""States of which an update is under way: a script that has only the module left must find it complete."""


def forget_update(updates: Updates) -> None:
    """Its update is complete."""
    _under_way.pop(updates, None)


@dataclass(eq=False)
class TrainState:
    """One rank's part of a training."""

    module: nn.Module
    config: Resolved
    comm: Comm
    ledger: Ledger
    policy: StagePolicy
    units: Sequence[Unit]
    """In forward order, the root unit and the small parameters first."""
    frozen: Sequence[tuple[str, nn.Parameter]]
    """Parameters that are not trained and whole on every rank; at stage 3 large ones are in their units."""
    optimizer: ZeroOptimizer
    shard_optimizers: Sequence[ShardOptimizer]
    """One for each of `flats`."""
    scaler: Scaler
    accumulation: Accumulation
    reducer: GradReducer
    unsharder: Unsharder
    updates: Updates
    full: FullModel
    changes: ScriptChanges
    pool: BufferPool
    predivision: float
    """Factor on each gradient before it is reduced: see GradientConfig.scale."""
    grad_offload: GradOffload | None = None
    """The gradients' way to states in other memory than the device's."""
    transfers: Transfers | None = None
    """Copies between device and host; None where nothing is offloaded, or host and device are one memory."""
    working_memory: Sequence[torch.Tensor] = ()
    """Device memory that belongs to no parameter group."""
    counters: Counters = field(default_factory=Counters)
    lr_scheduler: Any = None

    @property
    def device(self) -> torch.device:
        return self.comm.device

    @cached_property
    def flats(self) -> list[FlatParamGroup]:
        """The trained parameter groups in forward order, which is the order of updates."""
        return [flat for unit in self.units for flat in unit.flats]

    @cached_property
    def frozen_flats(self) -> list[FlatParamGroup]:
        return [flat for unit in self.units for flat in unit.frozen]

    @property
    def gradient_divisor(self) -> float:
        """From the gradients that are held to the mean over ranks, without the loss scale."""
        return self.comm.world_size * self.predivision * self.scaler.scale

    @property
    def gradients_reduced(self) -> bool:
        """Whether the gradients that have arrived are summed over the ranks, and not only accumulated on this one."""
        return self.policy.shards_gradients or self.accumulation.reduced_at_boundary

    def settle_gradients(self) -> None:
        """Returns when gradients that were on their way to host memory have arrived."""
        if self.grad_offload is not None:
            self.grad_offload.drain()

    def update(self, groups: Sequence[Hyper], scale: float) -> None:
        """Take an optimizer step with gradient x `scale`; with offload it may still be running on return."""
        self.counters.optimizer_steps += 1
        self.unsharder.reshard_all()
        self.updates.launch(groups, self.counters.optimizer_steps, scale)
        if self.updates.under_way:
            _under_way[self.updates] = self

    def synchronize(self) -> None:
        """Returns when the last step's update is complete: with offload it may still be running after step()."""
        self.updates.drain()
        if self.transfers is not None:
            self.transfers.settle()  # the device writes host memory, too, and all-gathers read it

    def settle_changes(self) -> None:
        """Before masters are saved: take over what the script has changed since the last step."""
        self.updates.drain()
        if self.changes.detected():
            self.changes.commit()

    def masters_to_parameters(self) -> None:
        """The masters were written from outside (a checkpoint): so are the parameters, on all ranks. Collective."""
        for flat in self.flats:
            flat.masters_to_parameters()
        self.unsharder.reshard_all()
        for pending in [flat.all_gather_updated() for flat in self.flats if not flat.sharded]:
            pending.wait()

    def discard_accumulated(self) -> None:
        """Forget the gradients and losses since the last boundary."""
        self.settle_gradients()
        self.reducer.clear()
        self.accumulation.restart()
