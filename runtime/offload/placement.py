"""Decides which groups' states live on the device and which in host memory (zero_optimization.offload_optimizer and
offload_param), and makes the buffers, streams and threads that offload needs."""

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
from runtime.config import ConfigError, OffloadOptimizerConfig, OffloadParamConfig, Resolved
from runtime.host import cores
from runtime.host.ledger import Ledger, zeros
from runtime.host.memory_limits import HostMemoryError, check_host_memory
from runtime.host.pinned import Arena, page_rounded
from runtime.offload.download import GradOffload
from runtime.offload.split import SAMPLE, Rates, device_share, measure
from runtime.offload.streamed import GpuStreamer, ring_bytes
from runtime.offload.upload import ParamUpload, Streamer
from runtime.plan.constants import OFFLOAD_SLOTS
from runtime.plan.layout import keep_mask, offload_mask, padded
from runtime.zero.gradients import GradientConfig
from runtime.zero.stage import StagePolicy
from runtime.zero.state_placement import Allocate, StatePlacement

log = logging.getLogger("runtime.setup")


@dataclass(frozen=True)
class FlatSize:
    """Size of a flat parameter group before it is made: `numel` elements, without padding, of one dtype."""

    numel: int
    dtype: torch.dtype
    trained: bool
    sharded: bool


@dataclass
class Placement:
    """Where one engine's states live, and what copies and updates those that are offloaded."""

    device: StatePlacement
    host: StatePlacement | None = None
    """Memory of offloaded states; None: no states are offloaded."""
    shards_on_host: StatePlacement | None = None
    """Memory of offloaded parameters; None: none are."""
    on_host: tuple[bool, ...] = ()
    """For each group, in forward order: whether its states are offloaded."""
    transfers: Transfers | None = None
    """Copies between host and device; None if they are one memory."""
    upload: ParamUpload | None = None
    executor: Executor | None = None
    overlap: bool = True

    @property
    def grad_offload(self) -> GradOffload | None:
        """Downloads gradients to the host; None: no states are in other memory than their parameters."""
        return self.upload.grad_offload if self.upload is not None else None

    @property
    def working_memory(self) -> list[torch.Tensor]:
        """Device memory that is held between two steps and belongs to no parameter group."""
        memory = getattr(self.upload.streamer, "memory", None) if self.upload is not None else None
        return [memory] if memory is not None else []

    def of(self, index: int) -> StatePlacement:
        """The placement of the states of group `index`, in forward order."""
        return self.host if self.host is not None and self.on_host[index] else self.device

    def upload_of(self, index: int) -> ParamUpload | None:
        """What updates the states of group `index` if they are in other memory than its parameters, else None."""
        return self.upload if self.of(index).remote else None


@dataclass(frozen=True)
class _Plan:
    """Sizes, before anything is allocated."""

    shard_numels: tuple[int, ...]  # elements of each group's state shard
    on_host: tuple[bool, ...]
    slots: tuple[int, ...]  # bytes of each pinned buffer that copies pass through
    blocks: tuple[int, ...]  # bytes of each allocation in host memory


def choose_placement(
    config: Resolved,
    policy: StagePolicy,
    comm: Comm,
    ledger: Ledger,
    gradients: GradientConfig,
    sizes: Sequence[FlatSize],
    adam: bool,
    transfers: Transfers | None,
    frozen_bytes: int = 0,
) -> Placement:
    """Decide which states are offloaded, the same on every rank, and make the buffers of their copies.

    sizes: of all groups, in forward order. frozen_bytes: of the parameters in no group, which every rank will hold.
    adam: whether the optimizer is Adam or AdamW, for which there are kernels.
    transfers: copies between host and device; None if the device is the CPU.

    Raises ConfigError on every rank if one of the hosts has too little memory.
    """
    placement = Placement(StatePlacement.on(comm.device, ledger), on_host=(False,) * len(sizes))
    optimizer, parameters = config.offload_optimizer, config.offload_param
    if optimizer is None and parameters is None:
        return placement
    placement.transfers = transfers
    plan = _plan(config, policy, comm, gradients, sizes, placement.transfers is not None, frozen_bytes)
    pins = [section is not None and section.pin_memory for section in (optimizer, parameters)]
    pin = any(pins) and comm.device.type == "cuda"
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _check_memory(plan, pin, local_world, comm)
    share = _bind_cores(local_world)
    for_optimizer, for_parameters = _host_memory(comm.device, pins, share, ledger)
    remote = placement.transfers is not None
    if parameters is not None:
        placement.shards_on_host = StatePlacement(ledger, for_parameters, offloaded=True, remote=remote)
    if optimizer is None:
        return placement
    placement.host = StatePlacement(ledger, for_optimizer, offloaded=True, remote=remote)
    placement.on_host, placement.overlap = plan.on_host, config.zerotop.offload.overlap
    threads = share.threads if share is not None and remote else torch.get_num_threads()
    placement.executor = ThreadPoolExecutor(1, "offload", _init_thread, (threads, comm.device))
    if placement.transfers is not None and any(plan.on_host):
        slots = [placement.host.zeros("communication", size, torch.uint8) for size in plan.slots]
        grad_offload = GradOffload(placement.transfers, placement.executor, threads, slots[:OFFLOAD_SLOTS])
        placement.upload = ParamUpload(placement.transfers, grad_offload, slots[OFFLOAD_SLOTS:])
        if config.zerotop.offload.update != "cpu":
            _set_device_share(config, placement, comm, gradients.accumulate, adam, threads)
    return placement


def _init_thread(threads: int, device: torch.device) -> None:
    """Initialise the thread that updates offloaded states."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise its calls would make a CUDA context on the first GPU
    torch.set_num_threads(threads)


def _plan(
    config: Resolved,
    policy: StagePolicy,
    comm: Comm,
    gradients: GradientConfig,
    sizes: Sequence[FlatSize],
    remote: bool,
    frozen_bytes: int,
) -> _Plan:
    numels = tuple(_state_numel(size, policy, comm.world_size) for size in sizes)
    on_host = [False] * len(sizes)
    if config.offload_optimizer is not None:
        trained = [index for index, size in enumerate(sizes) if size.trained]
        keep = keep_mask([numels[index] for index in trained], config.offload_optimizer.ratio)
        room = _vram_for_states(config, policy, comm, gradients, sizes, numels, frozen_bytes)
        offload_each = offload_mask([numels[index] for index in trained], keep, room)
        for index, leave in zip(trained, offload_each, strict=True):
            on_host[index] = leave
    moving = [(n, size.dtype) for n, size, on in zip(numels, sizes, on_host, strict=True) if on]
    slots: list[int] = []
    if remote and moving:
        down = max(n * _download_bytes(policy, gradients, dtype) for n, dtype in moving)
        slots = [down] * OFFLOAD_SLOTS + [max(n * dtype.itemsize for n, dtype in moving)] * OFFLOAD_SLOTS
    kept = gradients.accumulate.itemsize if policy.shards_gradients else 0
    blocks = [*slots]
    for n, size, on in zip(numels, sizes, on_host, strict=True):
        params_on_host = size.sharded and config.offload_param is not None
        if on:
            own_masters = size.dtype == torch.float32 and (params_on_host or not remote)
            moment = (2 if config.zerotop.optimizer_state_dtype == "bf16" else 4) * n
            blocks += [0 if own_masters else 4 * n, moment, moment, kept * n]
        if params_on_host:
            blocks.append(n * size.dtype.itemsize)
    return _Plan(numels, tuple(on_host), tuple(slots), tuple(blocks))


def _download_bytes(policy: StagePolicy, gradients: GradientConfig, dtype: torch.dtype) -> int:
    """Most bytes per element of gradients that are downloaded: after no_sync they have the accumulation dtype."""
    if not policy.shards_gradients:
        return gradients.accumulate.itemsize
    if gradients.communicate is not None:
        return gradients.communicate.itemsize
    return max(dtype.itemsize, gradients.accumulate.itemsize)


def _state_numel(size: FlatSize, policy: StagePolicy, world_size: int) -> int:
    whole = padded(size.numel, world_size)
    return whole // world_size if policy.shards_states else whole


def _vram_for_states(
    config: Resolved,
    policy: StagePolicy,
    comm: Comm,
    gradients: GradientConfig,
    sizes: Sequence[FlatSize],
    numels: Sequence[int],
    frozen_bytes: int,
) -> int:
    """Bytes of VRAM for states that may stay on the device, on the rank that has least: what is free now, less the
    parameters and gradients that will be allocated and zerotop.offload.vram_reserve_gib."""
    reserve = config.zerotop.offload.vram_reserve_gib
    if reserve is None or comm.device.type != "cuda":
        return 0
    coming = frozen_bytes
    for size, own in zip(sizes, numels, strict=True):
        whole = padded(size.numel, comm.world_size)
        params_on_host = size.sharded and config.offload_param is not None
        coming += 0 if params_on_host else size.dtype.itemsize * (own if size.sharded else whole)
        coming += gradients.accumulate.itemsize * (own if policy.shards_gradients else whole) * size.trained
    if config.zerotop.offload.update != "cpu":
        coming += ring_bytes(_chunk_bytes(config), gradients.accumulate, torch.float32)
    largest = sorted((padded(s.numel, comm.world_size) * s.dtype.itemsize for s in sizes), reverse=True)[:2]
    free = torch.cuda.mem_get_info(comm.device)[0]
    room = free - coming - 2 * sum(largest) - int(reserve * 2**30)
    return max(0, min(comm.gather_objects(room)))


def _check_memory(plan: _Plan, pin: bool, local_world: int, comm: Comm) -> None:
    """Raise ConfigError on every rank, before anything is allocated, if any rank's host has too little memory."""
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
"""Number of ranks on this host -> this process's share of the cores. Taken once, because a bound process sees only its
share."""


def _bind_cores(local_world: int) -> cores.Share | None:
    """Bind this rank to its share of the cores. None: it is the only rank on its host."""
    if local_world < 2:
        return None
    if local_world not in _shares:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        _shares[local_world] = cores.share(local_rank, local_world, gpu_nodes=_gpu_nodes(local_world))
        cores.bind(_shares[local_world])
    return _shares[local_world]


def _gpu_nodes(local_world: int) -> list[int | None]:
    """NUMA node of each local rank's GPU; empty if that can't be found out."""
    if not torch.cuda.is_available() or torch.cuda.device_count() < local_world:
        return []
    found: list[Any] = [torch.cuda.get_device_properties(index) for index in range(local_world)]
    if not all(hasattr(p, "pci_bus_id") for p in found):
        return []
    ids = [f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0" for p in found]
    return [cores.gpu_node(pci) for pci in ids]


def transfers_for(device: torch.device) -> Transfers | None:
    """Makes copies between the host and `device`; None if that is the CPU."""
    return CudaTransfers(device) if device.type == "cuda" else None


def _host_memory(
    device: torch.device, pins: Sequence[bool], share: cores.Share | None, ledger: Ledger
) -> list[Allocate]:
    """An allocator of host memory for each of `pins`, page-locked or not. With a GPU all pages are in memory before
    training begins; on a CPU it is ordinary memory."""
    if device.type != "cuda":
        return [lambda numel, dtype: zeros(numel, dtype, torch.device("cpu")) for _ in pins]
    arenas = {pin: Arena(pin=pin, device=device.index, nodes=share.nodes if share else ()) for pin in set(pins)}
    if locked := arenas.get(True):
        ledger.pinned = lambda: (locked.requested_bytes, locked.real_bytes)
    return [arenas[pin].zeros for pin in pins]


def streamer_for(device: torch.device, chunk_bytes: int, gradient: torch.dtype, out: torch.dtype) -> Streamer | None:
    """Makes what updates offloaded states on the device; None without a GPU or CUDA kernels."""
    usable = device.type == "cuda" and native.cuda_available()
    return GpuStreamer(device, chunk_bytes, gradient, out) if usable else None


def _set_device_share(
    config: Resolved, placement: Placement, comm: Comm, accumulate: torch.dtype, adam: bool, threads: int
) -> None:
    """Apply zerotop.offload.update: the device updates all offloaded states ("gpu") or a measured share ("auto")."""
    upload, section = placement.upload, config.zerotop.offload
    assert upload is not None
    if not adam:
        if section.update == "gpu":
            raise ConfigError(
                'zerotop.offload.update: "gpu" supports AdamW and Adam only; use "cpu" with this optimizer'
            )
        return
    if config.zerotop.optimizer_state_dtype != "fp32":  # "gpu" is refused at launch
        return
    if pageable := [key for key in ("offload_optimizer", "offload_param") if _is_pageable(getattr(config, key))]:
        if section.update == "gpu":
            keys = " and ".join(f"zero_optimization.{key}.pin_memory" for key in pageable)
            raise ConfigError(
                f'zerotop.offload.update: "gpu" streams states and parameters from page-locked memory; set {keys} to '
                "true"
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
    upload.device_share = 1.0 if section.update == "gpu" else _measured_share(upload, comm, accumulate, threads)
    if upload.device_share == 0.0:
        upload.streamer = None  # frees its device memory
    for memory in placement.working_memory:
        placement.device.hold("communication", memory)


def _is_pageable(section: OffloadOptimizerConfig | OffloadParamConfig | None) -> bool:
    """Whether `section` of the config offloads to memory that is not page-locked."""
    return section is not None and not section.pin_memory


def _chunk_bytes(config: Resolved) -> int:
    return int(config.zerotop.offload.chunk_mib * 2**20)


def _measured_share(upload: ParamUpload, comm: Comm, accumulate: torch.dtype, threads: int) -> float:
    """Measure the device's best share on all ranks of a host at once, because that is how they will update."""
    assert upload.streamer is not None
    with Arena(pin=True, device=comm.device.index) as arena:
        comm.gather_objects(None)
        rates = _rates(upload.streamer, upload.transfers, arena.zeros, comm.device, accumulate, threads)
    share = device_share(rates)
    if comm.rank == 0:
        log.info(
            f"offload: alone, the CPU updates {rates.cpu / 1e6:,.0f} million parameters/s and the GPU "
            f"{rates.gpu / 1e6:,.0f}; at once {rates.cpu_beside / 1e6:,.0f} and {rates.gpu_beside / 1e6:,.0f}: "
            f"the GPU updates {share:.0%}"
        )
    return share


def _rates(
    streamer: Streamer,
    transfers: Transfers,
    allocate: Allocate,
    device: torch.device,
    accumulate: torch.dtype,
    threads: int,
) -> Rates:
    """accumulate: dtype of gradients on the host, for which the streamer has room."""
    dtypes = (*[torch.float32] * 3, accumulate)
    on_cpu, on_gpu = ([allocate(SAMPLE, dtype) for dtype in dtypes] for _ in range(2))
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
