"""Which flats' states live where: with the parameters, or in host memory (zero_optimization.offload_optimizer and
offload_param), what moves between the two, and who updates what is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from runtime import native
from runtime.comm import Comm
from runtime.comm.transfer import CudaTransfers, Transfers
from runtime.config import ConfigError, Resolved
from runtime.host import cores
from runtime.host.ledger import Ledger, zeros
from runtime.host.memory_limits import HostMemoryError, check_host_memory
from runtime.host.pinned import Arena, page_rounded
from runtime.offload.download import GradOffload
from runtime.offload.split import SAMPLE, Rates, device_share, measure
from runtime.offload.streamed import GpuStreamer, ring_bytes
from runtime.offload.upload import ParamUpload, Streamer
from runtime.plan.constants import OFFLOAD_SLOTS
from runtime.plan.layout import kept_on_device, leaving_for_room, padded
from runtime.zero.gradients import GradientConfig
from runtime.zero.stage import StagePolicy
from runtime.zero.state_placement import Allocate, StatePlacement

log = logging.getLogger("runtime.setup")


@dataclass(frozen=True)
class Size:
    """A flat to be: `numel` elements (not padded) of one dtype."""

    numel: int
    dtype: torch.dtype
    trained: bool
    sharded: bool


@dataclass
class Placement:
    """Where things go in one engine."""

    device: StatePlacement
    host: StatePlacement | None = None
    """Of offloaded states. None: nothing is offloaded."""
    shards_on_host: StatePlacement | None = None
    """Of offloaded parameters."""
    on_host: tuple[bool, ...] = ()
    """For each flat, in forward order: whether its states are offloaded."""
    transfers: Transfers | None = None
    """None: host and device are one memory."""
    upload: ParamUpload | None = None
    executor: Executor | None = None
    overlap: bool = True

    @property
    def grad_offload(self) -> GradOffload | None:
        return self.upload.grad_offload if self.upload is not None else None

    @property
    def working_memory(self) -> list[torch.Tensor]:
        """On the device, between two steps, and of no flat."""
        memory = getattr(self.upload.streamer, "memory", None) if self.upload is not None else None
        return [memory] if memory is not None else []

    def of(self, index: int) -> StatePlacement:
        """Of the states of flat `index`."""
        return self.host if self.host is not None and self.on_host[index] else self.device

    def upload_of(self, index: int) -> ParamUpload | None:
        """What flat `index`'s optimizer needs for states that are elsewhere."""
        return self.upload if self.of(index).remote else None


@dataclass(frozen=True)
class _Plan:
    """Sizes in elements and bytes, before anything is taken."""

    ranges: tuple[int, ...]  # elements of each flat's state shard
    on_host: tuple[bool, ...]
    slots: tuple[int, ...]  # bytes
    blocks: tuple[int, ...]  # bytes of everything in host memory


def place(
    config: Resolved,
    policy: StagePolicy,
    comm: Comm,
    ledger: Ledger,
    numbers: GradientConfig,
    sizes: Sequence[Size],
    adam: bool,
    transfers: Transfers | None,
) -> Placement:
    """Decide, and make what copies need. `sizes`: of all flats in forward order. adam: the optimizer is one that our
    kernels know. transfers: None where the device is the host. The same on every rank.

    Raises ConfigError on every rank where a host has too little memory.
    """
    placement = Placement(StatePlacement.on(comm.device, ledger), on_host=(False,) * len(sizes))
    optimizer, parameters = config.offload_optimizer, config.offload_param
    if optimizer is None and parameters is None:
        return placement
    placement.transfers = transfers
    plan = _plan(config, policy, comm, numbers, sizes, remote=placement.transfers is not None)
    pins = [section is not None and section.pin_memory for section in (optimizer, parameters)]
    pin = any(pins) and comm.device.type == "cuda"
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _check_memory(plan, pin, local_world, comm)
    share = _bound(local_world)
    for_optimizer, for_parameters = _host_memory(comm.device, pins, share, ledger)
    remote = placement.transfers is not None
    if parameters is not None:
        placement.shards_on_host = StatePlacement(ledger, for_parameters, offloaded=True, remote=remote)
    if optimizer is None:
        return placement
    placement.host = StatePlacement(ledger, for_optimizer, offloaded=True, remote=remote)
    placement.on_host, placement.overlap = plan.on_host, config.zerotop.offload.overlap
    threads = share.threads if share is not None and remote else torch.get_num_threads()
    placement.executor = ThreadPoolExecutor(1, "offload", _enter, (threads, comm.device))
    if placement.transfers is not None and any(plan.on_host):
        slots = [placement.host.zeros("communication", size, torch.uint8) for size in plan.slots]
        grad_offload = GradOffload(placement.transfers, placement.executor, threads, slots[:OFFLOAD_SLOTS])
        placement.upload = ParamUpload(placement.transfers, grad_offload, slots[OFFLOAD_SLOTS:])
        if config.zerotop.offload.update != "cpu":
            _share_with_device(config, placement, comm, numbers.accumulate, adam, threads)
    return placement


def _enter(threads: int, device: torch.device) -> None:
    """The updating thread begins."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else its calls would make a context on the first GPU
    torch.set_num_threads(threads)


def _plan(
    config: Resolved, policy: StagePolicy, comm: Comm, numbers: GradientConfig, sizes: Sequence[Size], remote: bool
) -> _Plan:
    ranges = tuple(_state_numel(size, policy, comm.world_size) for size in sizes)
    on_host = [False] * len(sizes)
    if config.offload_optimizer is not None:
        trained = [index for index, size in enumerate(sizes) if size.trained]
        stays = kept_on_device([ranges[index] for index in trained], config.offload_optimizer.ratio)
        room = _room(config, policy, comm, numbers, sizes, ranges)
        leaves = leaving_for_room([ranges[index] for index in trained], stays, room)
        for index, leave in zip(trained, leaves, strict=True):
            on_host[index] = leave
    moving = [(n, size.dtype) for n, size, on in zip(ranges, sizes, on_host, strict=True) if on]
    slots: list[int] = []
    if remote and moving:
        down = max(n * _travels(policy, numbers, dtype) for n, dtype in moving)
        slots = [down] * OFFLOAD_SLOTS + [max(n * dtype.itemsize for n, dtype in moving)] * OFFLOAD_SLOTS
    kept = numbers.accumulate.itemsize if policy.shards_gradients else 0
    blocks = [*slots]
    for n, size, on in zip(ranges, sizes, on_host, strict=True):
        waits = size.sharded and config.offload_param is not None
        if on:
            own_masters = size.dtype == torch.float32 and (waits or not remote)
            blocks += [0 if own_masters else 4 * n, 4 * n, 4 * n, kept * n]
        if waits:
            blocks.append(n * size.dtype.itemsize)
    return _Plan(ranges, tuple(on_host), tuple(slots), tuple(blocks))


def _travels(policy: StagePolicy, numbers: GradientConfig, dtype: torch.dtype) -> int:
    """Most bytes per element that gradients have on their way to the host: after no_sync they come as they
    accumulated."""
    if not policy.shards_gradients:
        return numbers.accumulate.itemsize
    if numbers.communicate is not None:
        return numbers.communicate.itemsize
    return max(dtype.itemsize, numbers.accumulate.itemsize)


def _state_numel(size: Size, policy: StagePolicy, world_size: int) -> int:
    whole = padded(size.numel, world_size)
    return whole // world_size if policy.shards_states else whole


def _room(
    config: Resolved,
    policy: StagePolicy,
    comm: Comm,
    numbers: GradientConfig,
    sizes: Sequence[Size],
    ranges: Sequence[int],
) -> int:
    """Bytes of VRAM for states that may stay, on the rank that has least: what is free now, less the parameters and
    gradients to come and zerotop.offload.vram_reserve_gib."""
    reserve = config.zerotop.offload.vram_reserve_gib
    if reserve is None or comm.device.type != "cuda":
        return 0
    coming = 0
    for size, own in zip(sizes, ranges, strict=True):
        whole = padded(size.numel, comm.world_size)
        waits = size.sharded and config.offload_param is not None
        coming += 0 if waits else size.dtype.itemsize * (own if size.sharded else whole)
        coming += numbers.accumulate.itemsize * (own if policy.shards_gradients else whole) * size.trained
    if config.zerotop.offload.update != "cpu":
        coming += ring_bytes(_chunk_bytes(config), numbers.accumulate, torch.float32)
    largest = sorted((padded(s.numel, comm.world_size) * s.dtype.itemsize for s in sizes), reverse=True)[:2]
    free = torch.cuda.mem_get_info(comm.device)[0]
    room = free - coming - 2 * sum(largest) - int(reserve * 2**30)
    return max(0, min(comm.gather_objects(room)))


def _check_memory(plan: _Plan, pin: bool, local_world: int, comm: Comm) -> None:
    """One rank's lack is every rank's error, before anything is allocated."""
    problem, note = "", None
    try:
        note = check_host_memory(page_rounded(plan.blocks), pin=pin, local_world=local_world)
    except HostMemoryError as error:
        problem = str(error)
    problems = [found for found in comm.gather_objects(problem) if found]
    if problems:
        raise ConfigError(f"zero_optimization.offload_optimizer: {problems[0]}")
    if note and comm.rank == 0:
        log.warning(note)


_shares: dict[int, cores.Share] = {}
"""This process's share of the cores, by ranks on this host: taken once, for afterwards it is all that can be seen."""


def _bound(local_world: int) -> cores.Share | None:
    """Keep this rank on cores of its own. None: it is alone on its host, as far as it knows."""
    if local_world < 2:
        return None
    if local_world not in _shares:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        _shares[local_world] = cores.share(local_rank, local_world, gpu_nodes=_gpu_nodes(local_world))
        cores.bind(_shares[local_world])
    return _shares[local_world]


def _gpu_nodes(local_world: int) -> list[int | None]:
    if not torch.cuda.is_available() or torch.cuda.device_count() < local_world:
        return []
    found: list[Any] = [torch.cuda.get_device_properties(index) for index in range(local_world)]
    if not all(hasattr(p, "pci_bus_id") for p in found):
        return []
    ids = [f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0" for p in found]
    return [cores.gpu_node(pci) for pci in ids]


def transfers_for(device: torch.device) -> Transfers | None:
    """How copies between the host and `device` are made; None where it is the host."""
    return CudaTransfers(device) if device.type == "cuda" else None


def _host_memory(
    device: torch.device, pins: Sequence[bool], share: cores.Share | None, ledger: Ledger
) -> list[Allocate]:
    """Where host memory comes from, page-locked or not. Beside a GPU all of it is there before training begins; on a
    CPU it is memory like any other."""
    if device.type != "cuda":
        return [lambda numel, dtype: zeros(numel, dtype, torch.device("cpu")) for _ in pins]
    arenas = {pin: Arena(pin=pin, device=device.index, nodes=share.nodes if share else ()) for pin in set(pins)}
    if locked := arenas.get(True):
        ledger.pinned = lambda: (locked.requested_bytes, locked.real_bytes)
    return [arenas[pin].zeros for pin in pins]


def streamer_for(device: torch.device, chunk_bytes: int, gradient: torch.dtype, out: torch.dtype) -> Streamer | None:
    """Who updates states on the device; None where nobody can."""
    usable = device.type == "cuda" and native.cuda_available()
    return GpuStreamer(device, chunk_bytes, gradient, out) if usable else None


def _share_with_device(
    config: Resolved, placement: Placement, comm: Comm, accumulate: torch.dtype, adam: bool, threads: int
) -> None:
    """zerotop.offload.update: gpu gives the device all, auto what it was measured to be worth."""
    upload, section = placement.upload, config.zerotop.offload
    assert upload is not None
    if not adam:
        if section.update == "gpu":
            raise ConfigError('zerotop.offload.update: "gpu" is for AdamW and Adam; this optimizer needs "cpu"')
        return
    pinned = config.offload_optimizer is not None and config.offload_optimizer.pin_memory
    if not pinned:
        if section.update == "gpu":
            raise ConfigError(
                'zerotop.offload.update: "gpu" streams states from page-locked memory; set '
                "zero_optimization.offload_optimizer.pin_memory to true"
            )
        return
    upload.streamer = streamer_for(comm.device, _chunk_bytes(config), accumulate, torch.float32)
    if upload.streamer is None:
        if section.update == "gpu":
            raise ConfigError(
                'zerotop.offload.update: "gpu" needs the CUDA kernels, which are not built here (`zerotop doctor` says '
                'why); use "cpu"'
            )
        return
    upload.device_share = 1.0 if section.update == "gpu" else _measured_share(upload, comm, threads)
    if upload.device_share == 0.0:
        upload.streamer = None  # and with it goes its memory
    for memory in placement.working_memory:
        placement.device.hold("communication", memory)


def _chunk_bytes(config: Resolved) -> int:
    return int(config.zerotop.offload.chunk_mib * 2**20)


def _measured_share(upload: ParamUpload, comm: Comm, threads: int) -> float:
    """All ranks of a host measure at once, for that is how they will update."""
    assert upload.streamer is not None
    with Arena(pin=True, device=comm.device.index) as arena:
        comm.gather_objects(None)
        rates = _rates(upload.streamer, upload.transfers, arena.zeros, comm.device, threads)
    share = device_share(rates)
    if comm.rank == 0:
        log.info(
            f"offload: the CPU updates {rates.cpu / 1e6:,.0f} million parameters a second, the GPU "
            f"{rates.gpu / 1e6:,.0f}, both at once {rates.cpu_beside / 1e6:,.0f} and {rates.gpu_beside / 1e6:,.0f}: "
            f"the GPU takes {share:.0%}"
        )
    return share


def _rates(streamer: Streamer, transfers: Transfers, allocate: Allocate, device: torch.device, threads: int) -> Rates:
    on_cpu, on_gpu = ([allocate(SAMPLE, torch.float32) for _ in range(4)] for _ in range(2))
    out = torch.empty(SAMPLE, dtype=torch.bfloat16, device=device)
    hyper: dict[str, Any] = {"step": 1, "lr": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    hyper |= {"weight_decay": 0.0, "adamw": True}

    def cpu() -> None:
        p, m, v, g = on_cpu
        native.adamw(p, m, v, g, threads=threads, **hyper)

    def start_gpu() -> Callable[[], None]:
        p, m, v, g = on_gpu
        return streamer.update([native.Range(p, m, v, g, out)], [hyper], 1.0, transfers.mark()).wait_host

    return measure(cpu, start_gpu)
