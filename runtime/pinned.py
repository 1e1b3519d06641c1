"""Host memory of exact sizes, page-locked where a GPU copies from it; and whether the host has as much.

torch's own allocator of page-locked memory rounds every block up to a power of two: a block of 26 GiB takes 32. Here
each tensor has pages of its own, as many as it needs.
"""

from __future__ import annotations

import math
import mmap
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime import cgroup, native

if TYPE_CHECKING:
    import torch

_HUGE_PAGE = 2 << 20
_GIB = 1 << 30


class _Pages(mmap.mmap):
    """A private mapping. It lives as long as a tensor on it does; page-locking ends before the mapping in any case."""

    address = 0
    locked = False

    def lock(self, device: int) -> None:
        native.pin(self.address, len(self), device)
        self.locked = True

    def unlock(self) -> None:
        if self.locked:
            self.locked = False
            native.unpin(self.address)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the process's end CUDA is gone, and so is the registration
            self.unlock()


class Arena:
    """Gives out 1-D tensors of zeros in host memory.

    `close`, or the end of the arena, ends page-locking. Tensors that somebody still holds stay valid, as plain memory:
    copies from or to them must have ended before.
    """

    def __init__(
        self, *, pin: bool = True, device: int = 0, nodes: Sequence[int] = (), threads: int | None = None
    ) -> None:
        """
        Args:
            pin: page-lock the memory (cudaHostRegister); False gives plain pages, for `pin_memory: false` and no GPU.
            device: the GPU of this rank, whose context is made if there is none yet.
            nodes: NUMA nodes to take the pages from: `runtime.cores.Share.nodes`.
            threads: how many threads touch the pages first; None: OpenMP's default.
        """
        self._pin, self._device, self._nodes, self._threads = pin, device, tuple(nodes), threads
        self._pages: list[_Pages] = []
        self._requested = 0

    @property
    def requested_bytes(self) -> int:
        """What the tensors given out hold."""
        return self._requested

    @property
    def real_bytes(self) -> int:
        """What they take of the host's memory: whole pages."""
        return sum(map(len, self._pages))

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) zeros on pages of their own, which are in memory when this returns.

        Raises:
            MemoryError: the system gives no more address space.
            RuntimeError: CUDA does not page-lock it. Limits that are known beforehand are `check_host_memory`'s.
        """
        import torch

        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(0, dtype=dtype)
        try:
            pages = _Pages(-1, page_rounded([nbytes]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {_gib(nbytes)} of address space for an offloaded state: {error}") from error
        if len(pages) >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(pages, mmap.MADV_HUGEPAGE)  # fewer TLB misses; the part that fills no huge page stays small pages
        if self._pin and hasattr(mmap, "MADV_DONTFORK"):
            # A fork would copy page-locked pages at once (the driver pins them for long): no data loader needs that.
            _advise(pages, mmap.MADV_DONTFORK)
        tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
        pages.address = tensor.data_ptr()
        if native.available():
            native.touch(pages.address, len(pages), nodes=self._nodes, threads=self._threads)
        else:
            tensor.zero_()
        if self._pin:
            pages.lock(self._device)
        self._pages.append(pages)
        self._requested += nbytes
        return tensor

    def close(self) -> None:
        """End page-locking and give back the memory of all tensors that nobody holds. A second call does nothing."""
        pages, self._pages, self._requested = self._pages, [], 0
        for mapping in pages:
            mapping.unlock()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pages") and not sys.is_finalizing():
            self.close()


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def page_rounded(sizes: Iterable[int], page: int = mmap.PAGESIZE) -> int:
    """Bytes that blocks of these sizes take when each is rounded up to whole pages, as an `Arena` does."""
    return sum(-(-size // page) * page for size in sizes)


def power_of_two_rounded(sizes: Iterable[int]) -> int:
    """Bytes that the same blocks take from torch's allocator of page-locked memory.

    Source: CachingHostAllocator, c10::llvm::PowerOf2Ceil(size) in aten/src/ATen/core/CachingHostAllocator.h.
    """
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


# ---- limits ----------------------------------------------------------------------------------------------------------
class HostMemoryError(MemoryError):
    """The host doesn't have what a run would take."""


class Limits(NamedTuple):
    """What is left, in bytes; infinite where nothing limits it."""

    available_bytes: float  # MemAvailable: free, or freed at need
    swap_bytes: float
    group_limit_bytes: float  # of the control group that has the least left
    group_left_bytes: float  # of that limit, page cache counted as free
    memlock_bytes: float  # ulimit -l


def read_limits(root: Path = Path("/")) -> Limits:
    """As they are now. root: where /proc and /sys are, for tests."""
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
    """Refuse, before anything is allocated, what would end in the OOM killer's hands later.

    All ranks of a host call it before the first of them allocates: what one has taken is missing for the next.

    About `ulimit -l`: it doesn't bound cudaHostRegister. NVIDIA's kernel module pins user pages without charging them
    to the caller's locked memory (os_lock_user_pages in kernel-open/nvidia/os-mlock.c of
    NVIDIA/open-gpu-kernel-modules). mlock(2) is bounded, and so is what registers the same memory with an InfiniBand
    card (ib_umem_get in Linux's drivers/infiniband/core/umem.c). So a small limit is worth a line in the log, and is no
    reason to refuse.

    Args:
        need_bytes: what each of the ranks will take, in whole pages.
        pin: page-locked memory can't be swapped out.
        local_world: ranks on this host that take as much.

    Returns:
        A line for the log when `ulimit -l` is smaller than what a rank page-locks; else None.

    Raises:
        HostMemoryError: the control group or the machine has less left. The message says what is needed, what there is,
            and what can be done.
    """
    limits = limits or read_limits()
    total = need_bytes * local_world
    ranks = f"{local_world} ranks x {_gib(need_bytes)} = " if local_world > 1 else ""
    need = f"offload needs {ranks}{_gib(total)} of {'page-locked ' if pin else ''}host memory"
    ways = "use fewer ranks on this host or a higher ZeRO stage over more hosts, or offload less"
    if total > limits.group_left_bytes:
        raise HostMemoryError(
            f"{need}, but of this control group's limit of {_gib(limits.group_limit_bytes)} only "
            f"{_gib(limits.group_left_bytes)} are left. Raise the limit (docker run --memory, Slurm --mem), {ways}."
        )
    usable = limits.available_bytes + (0 if pin else limits.swap_bytes)
    if total > usable:
        swap = "" if pin or not limits.swap_bytes else " and swap"
        raise HostMemoryError(
            f"{need}, but this machine has only {_gib(usable)} of memory{swap} left. Free some, {ways}."
        )
    if pin and need_bytes > limits.memlock_bytes:
        return (
            f"ulimit -l is {_gib(limits.memlock_bytes)}, each rank page-locks {_gib(need_bytes)}: CUDA doesn't count "
            f"it, but registering the same memory with InfiniBand would fail (ulimit -l unlimited)"
        )
    return None


def _advise(pages: mmap.mmap, advice: int) -> None:
    try:
        pages.madvise(advice)
    except OSError:  # a kernel built without it: everything works, only not as fast
        return


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / (1 << 20):.1f} MiB"
