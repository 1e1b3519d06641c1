"""Pinned (page-locked) host memory in exact sizes.

torch's allocator of pinned memory rounds every block up to a power of two: 26 GiB take 32. Here each tensor has pages
of its own, as many as it needs.
"""

from __future__ import annotations

import functools
import mmap
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from runtime import native
from runtime.host.memory_limits import gib_text
from runtime.host.resident import CountedPages
from runtime.process.forked import Owner

if TYPE_CHECKING:
    import torch

_HUGE_PAGE = 2 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU


class _Pages(CountedPages):
    """A private mapping. It lives as long as a tensor in it; page-locking ends before the mapping does."""

    address = 0
    locked = False
    owner: Owner | None = None

    def lock(self, device: int) -> None:
        page_lock(self.address, len(self), device)
        self.locked, self.owner = True, Owner()

    def unlock(self) -> None:
        if self.locked and self.owner is not None and self.owner.is_here:
            self.locked = False
            page_unlock(self.address)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the process's end CUDA is gone, and so is the registration
            self.unlock()
            super().__del__()


class Arena:
    """Allocates 1-D tensors of zeros in host memory.

    `close`, or the end of the arena, waits for the GPU and ends page-locking. Tensors that are still referenced stay
    valid, in pageable memory. In a forked child both do nothing, because the memory is the parent's.
    """

    def __init__(
        self, *, pin: bool = True, device: int = 0, nodes: Sequence[int] = (), threads: int | None = None
    ) -> None:
        """
        Args:
            pin: whether to page-lock the memory (cudaHostRegister).
            device: the GPU of this rank, whose CUDA context is created if there is none yet.
            nodes: NUMA nodes to take the pages from: `runtime.host.cores.Share.nodes`.
            threads: number of threads that touch the pages first; None: OpenMP's default.
        """
        self._pin, self._device, self._nodes, self._threads = pin, device, tuple(nodes), threads
        self._owner = Owner()
        self._pages: list[_Pages] = []
        self._requested = 0

    @property
    def requested_bytes(self) -> int:
        """Bytes of all tensors that were allocated."""
        return self._requested

    @property
    def real_bytes(self) -> int:
        """Host memory that these tensors take, in whole pages."""
        return sum(map(len, self._pages))

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) zeros on pages of their own, which are in memory when this returns.

        Raises:
            MemoryError: the system has no more address space.
            RuntimeError: CUDA refuses to page-lock it. runtime/host/memory_limits.py checks known limits beforehand.
        """
        import torch

        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(0, dtype=dtype, device="cpu")
        try:
            pages = _Pages.make(page_rounded([nbytes]))
        except OSError as error:
            raise MemoryError(f"no {gib_text(nbytes)} of address space for an offloaded state: {error}") from error
        if len(pages) >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(pages, mmap.MADV_HUGEPAGE)  # fewer TLB misses
        if self._pin and hasattr(mmap, "MADV_DONTFORK"):
            # A fork would copy pinned pages at once, and a data loader's workers don't need them.
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
        """End page-locking, and free the memory of tensors that are not referenced. A second call does nothing."""
        pages, self._pages, self._requested = self._pages, [], 0
        if self._pin and pages and self._owner.is_here:
            import torch

            if torch.cuda.is_initialized():
                torch.cuda.synchronize(self._device)  # copies may still be under way
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
    """Total bytes of blocks of these sizes when each is rounded up to whole pages, as in an `Arena`."""
    return sum(-(-size // page) * page for size in sizes)


def power_of_two_rounded(sizes: Iterable[int]) -> int:
    """Total bytes of blocks of these sizes in torch's allocator of pinned memory.

    Source: CachingHostAllocator, c10::llvm::PowerOf2Ceil(size) in aten/src/ATen/core/CachingHostAllocator.h.
    """
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def page_lock(address: int, nbytes: int, device: int) -> None:
    """Page-lock memory for every GPU, through our CUDA library or, where that doesn't run, through torch."""
    if _has_kernels():
        native.pin(address, nbytes, device)
        return
    import torch

    with torch.cuda.device(device):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE)))


def page_unlock(address: int) -> None:
    """Undo `page_lock`, by the same address."""
    if _has_kernels():
        native.unpin(address)
        return
    import torch

    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


@functools.cache
def _has_kernels() -> bool:
    """Whether our CUDA library runs here: it is built, and for no newer CUDA than the driver's (torch's may be older).
    Cached, because memory must be unlocked by the library that locked it."""
    return native.cuda_available()


def _advise(pages: mmap.mmap, advice: int) -> None:
    try:
        pages.madvise(advice)
    except OSError:  # a Linux kernel built without it: only slower
        return
