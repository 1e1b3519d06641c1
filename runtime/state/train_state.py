"""`TrainState`: all state that an optimizer step changes. Checkpoints, commands and the release of GPU memory take it
as an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
from runtime.zero.step_decision import StepDecision
from runtime.zero.unit import Unit
from runtime.zero.unshard import Unsharder


@dataclass
class Counters:
    """Progress of a training."""

    global_steps: int = 0
    """Optimizer steps, skipped ones included, as progress and checkpoints count them."""
    optimizer_steps: int = 0
    """Optimizer steps that were not skipped, as Adam's bias correction counts them."""
    foreign_steps: int = 0
    """Steps of a loaded checkpoint whose optimizer states were not loaded."""
    lr_factor: float = 1.0
    """The run's factor on every learning rate (`zerotop set lr_factor=...`)."""

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient was not finite."""
        return self.global_steps - self.optimizer_steps - self.foreign_steps


_under_way: dict[Updates, TrainState] = {}
"""States with an update under way. It keeps them alive until the update is complete, also if the script keeps only the
module."""


def forget_update(updates: Updates) -> None:
    """Stop keeping the state of `updates` alive: its update is complete."""
    _under_way.pop(updates, None)


@dataclass(eq=False)
class TrainState:
    """The training state of one engine on this rank."""

    module: nn.Module
    config: Resolved
    comm: Comm
    ledger: Ledger
    policy: StagePolicy
    units: Sequence[Unit]
    """In forward order, the root unit and the small parameters first."""
    frozen: Sequence[tuple[str, nn.Parameter]]
    """Frozen parameters that are not sharded, by name; at stage 3 large frozen parameters are in their units."""
    optimizer: ZeroOptimizer
    shard_optimizers: Sequence[ShardOptimizer]
    """The optimizer of each of `flats`."""
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
    """Downloads gradients of offloaded states to the host; None: there are none in other memory."""
    transfers: Transfers | None = None
    """Makes copies between device and host; None if nothing is offloaded, or host and device are one memory."""
    working_memory: Sequence[torch.Tensor] = ()
    """Device memory that belongs to no parameter group."""
    counters: Counters = field(default_factory=Counters)
    lr_scheduler: Any = None
    settle_step: Callable[[], None] = lambda: None
    """Returns when the host knows whether the last step was taken: on a GPU it may run ahead of the device."""

    @property
    def device(self) -> torch.device:
        """The device on which this rank trains."""
        return self.comm.device

    @cached_property
    def flats(self) -> list[FlatParamGroup]:
        """The trained parameter groups in forward order, which is the order of updates."""
        return [flat for unit in self.units for flat in unit.flats]

    @cached_property
    def frozen_flats(self) -> list[FlatParamGroup]:
        """The groups of frozen parameters in forward order; stage 3 only."""
        return [flat for unit in self.units for flat in unit.frozen]

    @property
    def gradient_divisor(self) -> float:
        """Divisor that turns reduced gradients into their mean over ranks (their sum, if the config says so), without
        the loss scale."""
        ranks = self.comm.world_size if self.config.gradient_allreduce_op == "mean" else 1
        return ranks * self.predivision * self.scaler.scale

    @property
    def gradient_downloads(self) -> list[Future[float | None]] | None:
        """Downloads of gradients to their accumulators in host memory, of which some may be under way; None: gradients
        are accumulated on the device."""
        offload = self.grad_offload
        return offload.jobs if offload is not None and self.policy.shards_gradients else None

    @property
    def gradients_reduced(self) -> bool:
        """Whether the gradients since the last boundary are reduced over ranks, and not only accumulated on this
        one."""
        return self.policy.shards_gradients or self.accumulation.reduced_at_boundary

    def settle_gradients(self) -> None:
        """Wait until gradients that are being downloaded to host memory are accumulated there."""
        if self.grad_offload is not None:
            self.grad_offload.drain()

    def update(self, groups: Sequence[Hyper], decision: StepDecision) -> None:
        """Take an optimizer step, as if `decision` takes it; with offload it may still be running on return."""
        self.counters.optimizer_steps += 1
        self.unsharder.reshard_all()
        self.updates.launch(groups, self.counters.optimizer_steps, decision)
        if self.updates.under_way:
            _under_way[self.updates] = self

    def synchronize(self) -> None:
        """Wait until the last step's update is complete: with offload it may still be running after step()."""
        self.settle_step()
        self.updates.drain()
        if self.transfers is not None:
            self.transfers.settle()  # the device may still be writing host memory, which all-gathers read

    def settle_changes(self) -> None:
        """Before masters are saved: copy parameters that the script has changed since the last step to them."""
        self.updates.drain()
        if self.changes.detected():
            self.changes.commit()

    def masters_to_parameters(self) -> None:
        """Copy masters that were written from outside (a checkpoint) to the parameters on all ranks. Collective."""
        for flat in self.flats:
            flat.masters_to_parameters()
        self.unsharder.reshard_all(keep_writes=False)
        for pending in [flat.all_gather_updated() for flat in self.flats if not flat.sharded]:
            pending.wait()

    def discard_accumulated(self) -> None:
        """Discard the gradients and losses since the last boundary."""
        self.settle_gradients()
        self.reducer.clear()
        self.accumulation.restart()
