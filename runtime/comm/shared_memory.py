"""Collectives through shared memory, for ranks on one host without GPUs.

Each rank has an arena: a memory file (memfd) that the other ranks map read-only. A collective is published, not sent:
the rank writes the offset of its buffer into a ring of slots, and a rank that waits reads the buffers of its peers.

arena of a rank     | ring: RING slots of 64 bytes | buffer | buffer | ...        sparse: untouched pages take no memory
slot of number n    | posted | done | op | dtype | offset | nbytes | time of posting | label |
  posted = n        this rank's buffer for collective n is ready to be read
  done = n          this rank has read all ranks' buffers for collective n

Only its owner writes an arena. Every rank issues the same collectives in the same order, so the numbers match; if a
slot has another collective than expected, the rank that reads it raises ExchangeError.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import select
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from runtime import native
from runtime.host.resident import outside_malloc
from runtime.process.host_id import host_id

log = logging.getLogger("runtime.engine")

RING = 1024
"""Most collectives that may be under way or unread at once; an engine has far fewer."""
SLOT_BYTES = 64
SLICE_US = 100_000
"""Longest sleep of a wait in microseconds, after which it handles signals and looks for ranks that have ended."""
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""Dtypes that can be summed, with their numbers in slots; all-gathers take any dtype."""

_RECORD = struct.Struct("<IIQQQI")  # op, dtype, offset, nbytes, time of posting, label; behind the two words
_WORDS_BYTES = 8
_OPS = ("none", "reduce_scatter", "all_reduce", "all_gather", "all_reduce, second half")


class ExchangeError(RuntimeError):
    """A peer has ended, does not answer, or has issued another collective."""


class Exchange:
    """This rank's arena, and the mapped arenas of its peers."""

    def __init__(
        self,
        rank: int,
        own: mmap.mmap,
        peers: dict[int, mmap.mmap],
        pids: dict[int, int],
        pidfds: dict[int, int],
        timeout_s: float,
    ) -> None:
        """own, peers: arenas, by rank. pids, pidfds: process numbers and descriptors of the peers. timeout_s: of a
        wait."""
        self.rank, self.world_size, self.timeout_s = rank, len(peers) + 1, timeout_s
        self._own, self._peers = own, peers
        self.nbytes = len(own)
        self._base = {r: np.frombuffer(arena, np.uint8, 1).ctypes.data for r, arena in {**peers, rank: own}.items()}
        self._pids, self._pidfds = pids, pidfds
        self._free_at = RING * SLOT_BYTES
        self._released: list[tuple[int, int]] = []  # (nbytes, offset)
        self._next = 1
        self._names: dict[int, str] = {0: ""}

    # ---- making one --------------------------------------------------------------------------------------------------
    @classmethod
    def open(
        cls,
        rank: int,
        world_size: int,
        arena_bytes: int,
        gather_objects: Callable[[Any], list[Any]],
        timeout_s: float = 1800,
    ) -> Exchange | None:
        """Make an exchange on every rank, or return None on every rank where it is not possible (several hosts, not
        Linux, kernels not built).

        gather_objects: returns every rank's value on every rank. arena_bytes: memory that `empty` can allocate.
        """
        own = None
        why, mine = "", dict[str, Any]()
        try:
            own, fd = _create_arena(RING * SLOT_BYTES + arena_bytes)
            mine = {"host": host_id(), "pid": os.getpid(), "fd": fd, "nbytes": len(own)}
        except (OSError, ImportError, AttributeError, ValueError) as error:
            why = f"rank {rank}: {error}"
        others = gather_objects((mine, why))
        why = why or next((found for _, found in others if found), "")
        if not why and len({about["host"] for about, _ in others}) > 1:
            why = "the ranks are not on one host"
        peers: dict[int, mmap.mmap] = {}
        pidfds: dict[int, int] = {}
        if not why:
            try:
                peers = {r: _map_arena(about) for r, (about, _) in enumerate(others) if r != rank}
                pidfds = {r: os.pidfd_open(about["pid"]) for r, (about, _) in enumerate(others) if r != rank}
            except (OSError, AttributeError, ValueError) as error:
                why = f"rank {rank}: {error}"
        problems = [found for found in gather_objects(why) if found]  # also a barrier: all arenas are mapped
        if mine:
            os.close(mine["fd"])
        if problems or own is None:
            for descriptor in pidfds.values():
                os.close(descriptor)
            log.debug(f"collectives use Gloo instead of shared memory: {problems[0] if problems else why}")
            return None
        pids = {r: about["pid"] for r, (about, _) in enumerate(others) if r != rank}
        return cls(rank, own, peers, pids, pidfds, timeout_s)

    def close(self) -> None:
        """End the exchange. Tensors in the arena stay valid."""
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds.clear()

    def __del__(self) -> None:
        self.close()

    # ---- memory ------------------------------------------------------------------------------------------------------
    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) uninitialised, in this rank's arena, starting on a page. Raises MemoryError when the arena is
        full."""
        nbytes = _page_rounded(max(1, numel) * dtype.itemsize)
        fitting = [entry for entry in self._released if entry[0] == nbytes]
        if fitting:
            self._released.remove(fitting[0])
            offset = fitting[0][1]
        else:
            offset = self._free_at
            if offset + nbytes > self.nbytes:
                raise MemoryError(f"shared memory for collectives ({self.nbytes:,} bytes) has no {nbytes:,} left")
            self._free_at += nbytes
        outside_malloc.add(nbytes)
        return torch.frombuffer(self._own, dtype=dtype, count=numel, offset=offset)

    def release(self, tensor: torch.Tensor) -> None:
        """Free a tensor from `empty` and its pages. It must not be used any more."""
        nbytes, offset = _page_rounded(max(1, tensor.numel()) * tensor.element_size()), self._offset(tensor)
        self._own.madvise(mmap.MADV_REMOVE, offset, nbytes)
        self._released.append((nbytes, offset))
        outside_malloc.add(-nbytes)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` or what it is a view of came from `empty`."""
        return 0 <= self._offset(tensor) < self.nbytes

    def _offset(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr() - self._base[self.rank]

    def register_name(self, name: str) -> None:
        """Make the name of an all-gather known, so that errors can tell which one another rank has issued."""
        self._names[zlib.crc32(name.encode())] = name

    # ---- collectives -------------------------------------------------------------------------------------------------
    def reduce_scatter(self, buffer: torch.Tensor) -> Posted:
        """Publish `buffer` (1-D, fp32, bf16 or fp16, a multiple of the world size, from `empty`) to be summed."""
        return Posted(self, "reduce_scatter", self._post("reduce_scatter", buffer), buffer, buffer)

    def all_reduce(self, buffer: torch.Tensor) -> Posted:
        """Publish `buffer`, as in `reduce_scatter`; afterwards all of it has the sum."""
        number = self._post("all_reduce", buffer)
        self._next += 1  # for its second half
        return Posted(self, "all_reduce", number, buffer, buffer)

    def all_gather(self, full: torch.Tensor, shard: torch.Tensor, name: str = "") -> Posted:
        """Publish `shard` (from `empty`, any dtype), to be all-gathered into `full` (world size x shard, on the CPU).
        name: what is all-gathered; ranks with different names raise ExchangeError."""
        return Posted(self, "all_gather", self._post("all_gather", shard, name=name), full, shard, name)

    def _post(self, op: str, buffer: torch.Tensor, number: int | None = None, name: str = "") -> int:
        if number is None:
            number, self._next = self._next, self._next + 1
        if number > RING:
            self._wait_until_done(number - RING)
        at = number % RING * SLOT_BYTES
        nbytes = buffer.numel() * buffer.element_size()
        label = zlib.crc32(name.encode())
        record = (_OPS.index(op), DTYPES.get(buffer.dtype, 0), self._offset(buffer), nbytes, time.monotonic_ns(), label)
        _RECORD.pack_into(self._own, at + _WORDS_BYTES, *record)
        native.post(self._base[self.rank] + at, number)
        return number

    def _mark_done(self, number: int) -> None:
        native.post(self._base[self.rank] + number % RING * SLOT_BYTES + 4, number)

    def _wait_until_posted(self, number: int, op: str, buffer: torch.Tensor, name: str) -> tuple[dict[int, int], int]:
        """Wait until all peers have posted. Returns the address of each peer's buffer and the last time of posting
        (ns)."""
        addresses, last_ns = {}, 0
        nbytes = buffer.numel() * buffer.element_size()
        for peer, arena in self._peers.items():
            at = number % RING * SLOT_BYTES
            self._wait(peer, at, number)
            theirs, dtype, offset, size, posted_ns, label = _RECORD.unpack_from(arena, at + _WORDS_BYTES)
            same = (_OPS[theirs], size, label) == (op, nbytes, zlib.crc32(name.encode()))
            if not same or dtype != DTYPES.get(buffer.dtype, 0):
                other = self._names.get(label, "something else")
                raise ExchangeError(
                    f"the ranks issue different collectives: rank {self.rank} {_describe(op, nbytes, name)}, rank "
                    f"{peer} {_describe(_OPS[theirs], size, other)}. All ranks must run modules in the same order"
                )
            addresses[peer] = self._base[peer] + offset
            last_ns = max(last_ns, posted_ns)
        return addresses, last_ns

    def _wait_until_done(self, number: int) -> None:
        for peer in self._peers:
            self._wait(peer, number % RING * SLOT_BYTES + 4, number)

    def _wait(self, peer: int, word: int, number: int) -> None:
        address, until = self._base[peer] + word, time.monotonic() + self.timeout_s
        while not native.wait(address, number, SLICE_US):
            if peer in self._pidfds and _has_exited(self._pidfds[peer]):
                if native.wait(address, number, 0):  # it posted before it ended
                    return
                raise ExchangeError(f"rank {peer} (pid {self._pids[peer]}) is gone; this rank was waiting for it")
            if time.monotonic() > until:
                raise ExchangeError(f"rank {peer} did not answer within {self.timeout_s:g} s")

    def _drop_pages(self, peer: int, address: int, nbytes: int) -> None:
        """Unmap pages of a peer that were read, so that they don't count as memory of this process."""
        start = (address - self._base[peer]) // mmap.PAGESIZE * mmap.PAGESIZE
        self._peers[peer].madvise(mmap.MADV_DONTNEED, start, _page_rounded(address - self._base[peer] + nbytes - start))


class Posted:
    """A collective that this rank has published. `end_ns` and `wait_ns` are set after `wait` or `into`."""

    def __init__(
        self, exchange: Exchange, op: str, number: int, target: torch.Tensor, own: torch.Tensor, name: str = ""
    ) -> None:
        self._name = name
        self._exchange, self._op, self._number, self._target, self._own = exchange, op, number, target, own
        self.issue_ns = time.monotonic_ns()
        self.end_ns = 0
        """When the collective was complete on this rank: the last time of posting plus the time to read."""
        self.wait_ns = 0
        """How long this rank has waited for ranks that posted later."""

    def wait(self) -> None:
        """Wait for the peers and complete the collective."""
        exchange = self._exchange
        if self._op == "all_gather":
            self._gather()
        elif self._op == "reduce_scatter":
            self.into(self._shard_of(self._target, exchange.rank), add=False)
        else:
            self._reduce(self._shard_of(self._target, exchange.rank), add=False)
            self._number = exchange._post("all_reduce, second half", self._target, self._number + 1)
            self._copy_shards()

    def into(self, target: torch.Tensor, add: bool) -> None:
        """Complete a reduce-scatter: copy the sum of this rank's shard to `target` (shard,), or add it there. The sum
        is taken in fp32 in the order of the ranks. target: fp32 or 16 bit; it may be the shard itself."""
        self._reduce(target, add)

    def fence(self) -> None:
        """Wait until all peers have read this rank's buffer."""
        self._exchange._wait_until_done(self._number)

    def _shard_of(self, buffer: torch.Tensor, rank: int) -> torch.Tensor:
        numel = buffer.numel() // self._exchange.world_size
        return buffer[rank * numel : (rank + 1) * numel]

    def _reduce(self, target: torch.Tensor, add: bool) -> None:
        exchange, buffer = self._exchange, self._own
        numel = buffer.numel() // exchange.world_size
        addresses, before = self._wait_for_peers(buffer)
        addresses[exchange.rank] = buffer.data_ptr()
        begin = exchange.rank * numel
        native.sum_into(
            target,
            [addresses[rank] for rank in range(exchange.world_size)],
            begin,
            str(buffer.dtype),
            add=add,
            threads=torch.get_num_threads(),
        )
        size = buffer.element_size()
        for peer in exchange._peers:
            exchange._drop_pages(peer, addresses[peer] + begin * size, numel * size)
        self._finish(before)

    def _gather(self) -> None:
        exchange, own = self._exchange, self._own
        nbytes = own.numel() * own.element_size()
        addresses, before = self._wait_for_peers(own)
        place = self._shard_of(self._target, exchange.rank)
        if place.data_ptr() != own.data_ptr():
            place.copy_(own)
        for peer, address in addresses.items():
            ctypes.memmove(self._target.data_ptr() + peer * nbytes, address, nbytes)
            exchange._drop_pages(peer, address, nbytes)
        self._finish(before)

    def _copy_shards(self) -> None:
        """The second half of an all-reduce: copy the shards that the peers have summed."""
        exchange, buffer = self._exchange, self._target
        self._op = "all_reduce, second half"
        addresses, before = self._wait_for_peers(buffer)
        nbytes = buffer.numel() // exchange.world_size * buffer.element_size()
        for peer, address in addresses.items():
            ctypes.memmove(buffer.data_ptr() + peer * nbytes, address + peer * nbytes, nbytes)
            exchange._drop_pages(peer, address + peer * nbytes, nbytes)
        self._finish(before)

    def _wait_for_peers(self, buffer: torch.Tensor) -> tuple[dict[int, int], int]:
        """Wait for the peers. Returns the addresses of their buffers and the time (ns) at which reading begins."""
        began = time.monotonic_ns()
        addresses, last_ns = self._exchange._wait_until_posted(self._number, self._op, buffer, self._name)
        self._ready_ns = max(last_ns, self.issue_ns, self.end_ns)
        now = time.monotonic_ns()
        self.wait_ns += now - began
        return addresses, now

    def _finish(self, before: int) -> None:
        self._exchange._mark_done(self._number)
        self.end_ns = self._ready_ns + time.monotonic_ns() - before


def _describe(op: str, nbytes: int, name: str) -> str:
    return f"{op}{f' of {name}' if name else ''} ({nbytes:,} bytes)"


def _create_arena(nbytes: int) -> tuple[mmap.mmap, int]:
    if not native.available():
        raise ImportError("the CPU kernels are not built")
    descriptor = os.memfd_create("zerotop-exchange", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _page_rounded(nbytes))
    return mmap.mmap(descriptor, _page_rounded(nbytes)), descriptor


def _map_arena(about: dict[str, Any]) -> mmap.mmap:
    """A peer's arena, read-only, through the file descriptor that the peer still has open."""
    descriptor = os.open(f"/proc/{about['pid']}/fd/{about['fd']}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, about["nbytes"], prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _has_exited(pidfd: int) -> bool:
    """Whether the process has ended. Uses poll, because select refuses descriptors above 1023."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _page_rounded(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
