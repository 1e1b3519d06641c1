"""Which flats' states live where: with the parameters, or in host memory (zero_optimization.offload_optimizer and
offload_param), and what moves between the two."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from runtime.comm import Comm
from runtime.config import Resolved
from runtime.memory import Ledger, zeros
from runtime.optim.hostside import HostSide
from runtime.transfer import CudaTransfers, Transfers
from runtime.zero.downlink import SLOTS, Downlink
from runtime.zero.home import Allocate, Home
from runtime.zero.layout import kept_on_device, padded
from runtime.zero.stage import StagePolicy


@dataclass(frozen=True)
class Size:
    """A flat to be: `numel` elements (not padded) of one dtype."""

    numel: int
    dtype: torch.dtype
    trained: bool
    sharded: bool


@dataclass
class Placing:
    """Where things go in one engine."""

    device: Home
    host: Home | None = None
    """Of offloaded states. None: nothing is offloaded."""
    own_host: Home | None = None
    """Of offloaded parameters."""
    on_host: tuple[bool, ...] = ()
    """For each flat, in forward order: whether its states are offloaded."""
    transfers: Transfers | None = None
    """None: host and device are one memory."""
    side: HostSide | None = None
    executor: Executor | None = None

    @property
    def downlink(self) -> Downlink | None:
        return self.side.downlink if self.side is not None else None

    def home(self, index: int) -> Home:
        """Of the states of flat `index`."""
        return self.host if self.host is not None and self.on_host[index] else self.device

    def rule_side(self, index: int) -> HostSide | None:
        """What flat `index`'s rule needs for states that are elsewhere."""
        return self.side if self.home(index).remote else None


def place(
    config: Resolved, policy: StagePolicy, comm: Comm, ledger: Ledger, accumulate: torch.dtype, sizes: Sequence[Size]
) -> Placing:
    """Decide, and make what copies need. `sizes`: of all flats in forward order. The same on every rank."""
    placing = Placing(Home.on(comm.device, ledger), on_host=(False,) * len(sizes))
    optimizer, parameters = config.offload_optimizer, config.offload_param
    if optimizer is None and parameters is None:
        return placing
    placing.transfers = transfers_for(comm.device)
    remote = placing.transfers is not None
    allocate = host_memory(bool((optimizer or parameters).pin_memory), comm, ledger)  # type: ignore[union-attr]
    if parameters is not None:
        placing.own_host = Home(ledger, allocate, offloaded=True, remote=remote)
    if optimizer is None:
        return placing
    placing.host = Home(ledger, allocate, offloaded=True, remote=remote)
    ranges = [_state_numel(size, policy, comm.world_size) for size in sizes]
    stays = iter(kept_on_device([n for n, size in zip(ranges, sizes, strict=True) if size.trained], optimizer.ratio))
    placing.on_host = tuple(size.trained and not next(stays) for size in sizes)
    if config.zerotop.offload.overlap or remote:
        placing.executor = ThreadPoolExecutor(1, "offload", torch.set_num_threads, (torch.get_num_threads(),))
    if placing.transfers is not None and placing.executor is not None and any(placing.on_host):
        moving = [(n, size.dtype) for n, size, on in zip(ranges, sizes, placing.on_host, strict=True) if on]
        down = max(n * max(accumulate.itemsize, dtype.itemsize) for n, dtype in moving)
        up = max(n * dtype.itemsize for n, dtype in moving)
        slots = [placing.host.zeros("communication", size, torch.uint8) for size in [down] * SLOTS + [up] * SLOTS]
        downlink = Downlink(placing.transfers, placing.executor, torch.get_num_threads(), slots[:SLOTS])
        placing.side = HostSide(placing.transfers, downlink, slots[SLOTS:])
    return placing


def _state_numel(size: Size, policy: StagePolicy, world_size: int) -> int:
    whole = padded(size.numel, world_size)
    return whole // world_size if policy.own_states else whole


def transfers_for(device: torch.device) -> Transfers | None:
    """How copies between the host and `device` are made; None where it is the host."""
    return CudaTransfers(device) if device.type == "cuda" else None


def host_memory(pin: bool, comm: Comm, ledger: Ledger) -> Allocate:
    """Where host memory comes from."""
    return lambda numel, dtype: zeros(numel, dtype, torch.device("cpu"))
