"""Which CPU cores a rank uses: the ranks of a host get separate cores, near their memory and GPU.

Torch-free. `share` is pure arithmetic over a `Machine`; `read_machine` reads one from /sys, /proc and the cgroup.

`bind` sets the affinity of all threads of the process; threads that are started later (OpenMP's in the kernels, torch's
pool) inherit it. If a rank's cores are on one NUMA node, so are its threads and the pages that they touch first. Single
threads are not bound to single cores, because the pools of torch and of the kernels would be bound to the same ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from runtime.process import cgroup


class Core(NamedTuple):
    """A physical core: its logical CPUs (SMT siblings) that this process may use, lowest first."""

    node: int  # NUMA node
    cpus: tuple[int, ...]


class Machine(NamedTuple):
    """The CPUs that this process may use."""

    cores: tuple[Core, ...]
    quota_cpus: float  # CPU time that the cgroup grants, in CPUs; infinite without a limit


class Share(NamedTuple):
    """The CPUs of one rank."""

    cpus: tuple[int, ...]  # logical CPUs to bind to: one of each physical core, then their SMT siblings
    nodes: tuple[int, ...]  # the NUMA nodes these are on
    threads: int  # threads that compute: one for each physical core, no more than the quota pays for


def share(
    local_rank: int, local_world: int, machine: Machine | None = None, *, gpu_nodes: Sequence[int | None] = ()
) -> Share:
    """The CPUs of rank `local_rank` of the `local_world` ranks on this host. Every rank computes the same division.

    Cores are ordered by NUMA node and cut into equal pieces, so that a piece is on as few nodes as possible. A rank
    gets a piece on its GPU's node if one is left; the other ranks get the remaining pieces in order. With more ranks
    than physical cores, ranks get logical CPUs; with more ranks than those, ranks share them, with one thread each.

    Args:
        machine: by default what `read_machine` returns.
        gpu_nodes: the NUMA node of each local rank's GPU (`gpu_node`), None if it has none; empty: not known.

    Raises:
        ValueError: `local_rank` is not on this host.
    """
    if not 0 <= local_rank < local_world:
        raise ValueError(f"local rank {local_rank} of {local_world}")
    if gpu_nodes and len(gpu_nodes) != local_world:
        raise ValueError(f"{len(gpu_nodes)} GPU nodes for {local_world} ranks")
    machine = machine or read_machine()
    cores = sorted(machine.cores)
    if len(cores) < local_world:
        cores = [Core(core.node, (cpu,)) for core in cores for cpu in core.cpus]
    if len(cores) < local_world:
        pieces = [[cores[rank * len(cores) // local_world]] for rank in range(local_world)]
    else:
        cuts = [rank * len(cores) // local_world for rank in range(local_world + 1)]
        pieces = [cores[low:high] for low, high in pairwise(cuts)]
    piece = pieces[_assign(pieces, gpu_nodes or [None] * local_world)[local_rank]]
    cpus = [
        cpu for turn in range(max(len(core.cpus) for core in piece)) for core in piece for cpu in core.cpus[turn:][:1]
    ]
    paid = machine.quota_cpus / local_world
    threads = len(piece) if math.isinf(paid) else max(1, min(len(piece), math.floor(paid)))
    return Share(tuple(cpus), tuple(sorted({core.node for core in piece})), threads)


def bind(part: Share) -> int:
    """Bind this process, with its threads and those that it will start, to the CPUs of `part`.

    Call it before the first parallel operation, and before memory is touched, which stays on its NUMA node.

    Returns:
        The number of threads to compute with, for torch.set_num_threads and the kernels' `threads`.

    Raises:
        OSError: `part` has a CPU that this process may not use.
    """
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), part.cpus)
        except ProcessLookupError:  # the thread has just ended
            continue
    return part.threads


def read_machine(root: Path = Path("/"), allowed: set[int] | None = None) -> Machine:
    """The CPUs that this process may use.

    Args:
        root: where /sys and /proc are, for tests.
        allowed: logical CPUs; by default those of the affinity mask, which cpusets and launchers narrow.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    node_of: dict[int, int] = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for cpu in _cpu_list(cgroup.read(folder / "cpulist")):
            node_of[cpu] = int(folder.name[4:])
    cores = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = cgroup.read(topology / "core_cpus_list") or cgroup.read(
            topology / "thread_siblings_list"
        )  # the older name
        on_core = {*_cpu_list(siblings), cpu} & allowed
        cores.add(Core(node_of.get(cpu, 0), tuple(sorted(on_core))))
    return Machine(tuple(sorted(cores)), _quota(root))


def gpu_node(pci_bus_id: str, root: Path = Path("/")) -> int | None:
    """The NUMA node of the GPU at a PCI address such as "00000000:17:00.0"; None if it is not known."""
    domain, _, rest = pci_bus_id.lower().rpartition(":")[0].partition(":")
    address = f"{int(domain or '0', 16):04x}:{rest}:{pci_bus_id.lower().rpartition(':')[2]}"
    text = cgroup.read(root / "sys/bus/pci/devices" / address / "numa_node")
    node = int(text) if text else -1
    return node if node >= 0 else None


def _assign(pieces: list[list[Core]], gpu_nodes: Sequence[int | None]) -> list[int]:
    """Index of the piece that each rank gets."""
    free = list(range(len(pieces)))
    taken: dict[int, int] = {}
    for rank, node in enumerate(gpu_nodes):
        near = [
            i for i in free if node is not None and sum(core.node == node for core in pieces[i]) * 2 > len(pieces[i])
        ]
        if near:
            taken[rank] = near[0]
            free.remove(near[0])
    for rank in range(len(gpu_nodes)):
        if rank not in taken:
            taken[rank] = free.pop(0)
    return [taken[rank] for rank in range(len(gpu_nodes))]


def _quota(root: Path) -> float:
    """CPU time that the cgroups of this process grant, in CPUs: the smallest quota from its own up to the root."""
    quotas = [math.inf]
    for folder in cgroup.folders("", root):
        quota, _, period = (cgroup.read(folder / "cpu.max") or "max").partition(" ")
        if quota != "max":
            quotas.append(int(quota) / int(period))
    for folder in cgroup.folders("cpu", root):
        quota = cgroup.read(folder / "cpu.cfs_quota_us") or "-1"
        if int(quota) > 0:
            quotas.append(int(quota) / int(cgroup.read(folder / "cpu.cfs_period_us")))
    return min(quotas)


def _cpu_list(text: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]"""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        cpus.extend(range(int(low), int(high or low) + 1))
    return cpus
