"""How much memory this host has left, and whether that is enough for its ranks. Torch-free."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import NamedTuple

from runtime.process import cgroup

_GIB = 1 << 30


class HostMemoryError(MemoryError):
    """The host has too little memory left for a run."""


class Limits(NamedTuple):
    """Memory that is left, in bytes; infinite without a limit."""

    available_bytes: float  # MemAvailable: free or reclaimable
    swap_bytes: float
    group_limit_bytes: float  # limit of the control group that has least left
    group_left_bytes: float  # what is left of that limit; page cache counts as free
    memlock_bytes: float  # ulimit -l


def read_limits(root: Path = Path("/")) -> Limits:
    """The current limits. root: where /proc and /sys are, for tests."""
    memory = {}
    for line in cgroup.read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        memory[key] = int(value.split()[0]) * 1024
    left, limit = math.inf, math.inf
    v1, v2 = cgroup.folders("memory", root), cgroup.folders("", root)
    groups = [(folder, "memory.max", "memory.current", "") for folder in v2]
    groups += [(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_") for folder in v1]
    for folder, limit_name, used_name, prefix in groups:
        text = cgroup.read(folder / limit_name)
        if text in ("", "max") or int(text) >= 1 << 60:  # version 1 writes a huge number for none
            continue
        stat = dict(line.split() for line in cgroup.read(folder / "memory.stat").splitlines())
        cache = int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
        rest = max(0, int(text) - max(0, int(cgroup.read(folder / used_name) or 0) - cache))
        if rest < left:
            left, limit = rest, int(text)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Limits(
        memory.get("MemAvailable", math.inf),
        memory.get("SwapFree", 0),
        limit,
        left,
        math.inf if memlock == resource.RLIM_INFINITY else memlock,
    )


def check_host_memory(need_bytes: int, *, pin: bool, local_world: int = 1, limits: Limits | None = None) -> str | None:
    """Raise an error before anything is allocated if the host has too little memory, instead of being killed later.

    All ranks of a host must call it before the first of them allocates.

    About `ulimit -l`: it doesn't bound cudaHostRegister. NVIDIA's kernel module pins user pages without charging them
    to the caller's locked memory (os_lock_user_pages in kernel-open/nvidia/os-mlock.c of
    NVIDIA/open-gpu-kernel-modules). mlock(2) is bounded, and so is what registers the same memory with an InfiniBand
    card (ib_umem_get in Linux's drivers/infiniband/core/umem.c). So a small limit is only logged.

    Args:
        need_bytes: what each rank will allocate, in whole pages.
        pin: whether it is page-locked, and so can't be swapped out.
        local_world: number of ranks on this host.

    Returns:
        A line for the log if `ulimit -l` is smaller than what a rank page-locks, else None.

    Raises:
        HostMemoryError: the control group or the machine has less left.
    """
    limits = limits or read_limits()
    total = need_bytes * local_world
    ranks = f"{local_world} ranks x {gib_text(need_bytes)} = " if local_world > 1 else ""
    need = f"offload needs {ranks}{gib_text(total)} of {'page-locked ' if pin else ''}host memory"
    ways = "use fewer ranks on this host or a higher ZeRO stage over more hosts, or offload less"
    if total > limits.group_left_bytes:
        raise HostMemoryError(
            f"{need}, but of this control group's limit of {gib_text(limits.group_limit_bytes)} only "
            f"{gib_text(limits.group_left_bytes)} are left. Raise the limit (docker run --memory, Slurm --mem), {ways}."
        )
    usable = limits.available_bytes + (0 if pin else limits.swap_bytes)
    if total > usable:
        swap = "" if pin or not limits.swap_bytes else " and swap"
        raise HostMemoryError(
            f"{need}, but this machine has only {gib_text(usable)} of memory{swap} left. Free some, {ways}."
        )
    if pin and need_bytes > limits.memlock_bytes:
        return (
            f"ulimit -l is {gib_text(limits.memlock_bytes)}, but each rank page-locks {gib_text(need_bytes)}: CUDA "
            "ignores the limit, but registering the same memory with InfiniBand would fail; set ulimit -l unlimited"
        )
    return None


def host_has_room(need_bytes: int, *, pin: bool, local_world: int = 1, limits: Limits | None = None) -> bool:
    """Whether `check_host_memory` would raise nothing."""
    try:
        check_host_memory(need_bytes, pin=pin, local_world=local_world, limits=limits)
    except HostMemoryError:
        return False
    return True


def gib_text(nbytes: float) -> str:
    """A byte count in GiB, or in MiB below one GiB."""
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / (1 << 20):.1f} MiB"
