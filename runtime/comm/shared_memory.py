"""Collectives of ranks on one host without GPUs, through memory that they share.

Each rank has an arena: a memory file (memfd) that the others map read-only. A collective is published, not sent: the
rank writes where its buffer lies into a ring of slots, and whoever waits reads the others' buffers where they are.

arena of a rank     | ring: RING slots of 64 bytes | buffer | buffer | ...        sparse: untouched pages take no memory
slot of number n    | posted | done | op | dtype | offset | nbytes | time of posting | label |
  posted = n        this rank's buffer for collective n is ready to be read
  done = n          this rank has read everybody's buffer for collective n

Only its owner writes an arena. Every rank issues the same collectives in the same order, so the numbers match; a slot
that says otherwise means that the ranks have parted ways, and all of them say so.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import native

log = logging.getLogger("runtime.engine")

RING = 1024
"""Collectives that may be under way or unread at once; far more than an engine ever has."""
SLOT_BYTES = 64
SLICE_US = 100_000
"""How long a wait sleeps at a time, so that signals are handled and dead ranks found."""
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""What can be summed; gathers take anything."""

_RECORD = struct.Struct("<IIQQQI")  # op, dtype, offset, nbytes, time of posting, label; behind the two words
_WORDS_BYTES = 8
_OPS = ("none", "reduce_scatter", "all_reduce", "all_gather", "all_reduce, second half")


class ExchangeError(RuntimeError):
    """A rank is gone, or does something else than this one."""


class Exchange:
    """This rank's arena and its view of the others'."""

    def __init__(
        self,
        rank: int,
        own: mmap.mmap,
        peers: dict[int, mmap.mmap],
        pids: dict[int, int],
        alive: dict[int, int],
        timeout_s: float,
    ) -> None:
        """alive: a process descriptor of every other rank."""
        self.rank, self.world_size, self.timeout_s = rank, len(peers) + 1, timeout_s
        self._own, self._peers = own, peers
        self.nbytes = len(own)
        self._base = {r: np.frombuffer(arena, np.uint8, 1).ctypes.data for r, arena in {**peers, rank: own}.items()}
        self._pids, self._alive = pids, alive
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
        """An exchange on every rank, or None on every rank where that can't be (several hosts, no Linux, no kernels).

        gather_objects: hands every rank's value to every rank. arena_bytes: what `empty` may give out in all.
        """
        own = None
        why, mine = "", dict[str, Any]()
        try:
            own, fd = _create(RING * SLOT_BYTES + arena_bytes)
            mine = {"host": _host(), "pid": os.getpid(), "fd": fd, "nbytes": len(own)}
        except (OSError, ImportError, AttributeError, ValueError) as error:
            why = f"rank {rank}: {error}"
        others = gather_objects((mine, why))
        why = why or next((found for _, found in others if found), "")
        if not why and len({about["host"] for about, _ in others}) > 1:
            why = "the ranks are not on one host"
        peers: dict[int, mmap.mmap] = {}
        alive: dict[int, int] = {}
        if not why:
            try:
                peers = {r: _map(about) for r, (about, _) in enumerate(others) if r != rank}
                alive = {r: os.pidfd_open(about["pid"]) for r, (about, _) in enumerate(others) if r != rank}
            except (OSError, AttributeError, ValueError) as error:
                why = f"rank {rank}: {error}"
        problems = [found for found in gather_objects(why) if found]  # also: everybody has mapped everybody
        if mine:
            os.close(mine["fd"])
        if problems or own is None:
            for descriptor in alive.values():
                os.close(descriptor)
            log.debug(f"ranks exchange over Gloo, not through shared memory: {problems[0] if problems else why}")
            return None
        pids = {r: about["pid"] for r, (about, _) in enumerate(others) if r != rank}
        return cls(rank, own, peers, pids, alive, timeout_s)

    def close(self) -> None:
        """No more collectives. Tensors in the arena live on as long as somebody has them."""
        for descriptor in self._alive.values():
            os.close(descriptor)
        self._alive.clear()

    def __del__(self) -> None:
        self.close()

    # ---- memory ------------------------------------------------------------------------------------------------------
    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) uninitialised, in this rank's arena, starting on a page. Raises MemoryError when the arena is
        full."""
        nbytes = _up(max(1, numel) * dtype.itemsize)
        fitting = [entry for entry in self._released if entry[0] == nbytes]
        if fitting:
            self._released.remove(fitting[0])
            offset = fitting[0][1]
        else:
            offset = self._free_at
            if offset + nbytes > self.nbytes:
                raise MemoryError(f"the exchange of {self.nbytes:,} bytes has no {nbytes:,} left")
            self._free_at += nbytes
        return torch.frombuffer(self._own, dtype=dtype, count=numel, offset=offset)

    def release(self, tensor: torch.Tensor) -> None:
        """Give what `empty` gave back, with its pages; nobody may use it any more."""
        nbytes, offset = _up(max(1, tensor.numel()) * tensor.element_size()), self._offset(tensor)
        self._own.madvise(mmap.MADV_REMOVE, offset, nbytes)
        self._released.append((nbytes, offset))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` or what it is a view of came from `empty`."""
        return 0 <= self._offset(tensor) < self.nbytes

    def _offset(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr() - self._base[self.rank]

    def know(self, name: str) -> None:
        """Things with this name may be gathered: for telling what another rank does."""
        self._names[zlib.crc32(name.encode())] = name

    # ---- collectives -------------------------------------------------------------------------------------------------
    def reduce_scatter(self, buffer: torch.Tensor) -> Posted:
        """Publish `buffer` (1-D, fp32, bf16 or fp16, a multiple of the world size, from `empty`) to be summed."""
        return Posted(self, "reduce_scatter", self._post("reduce_scatter", buffer), buffer, buffer)

    def all_reduce(self, buffer: torch.Tensor) -> Posted:
        """The same, and afterwards all of `buffer` holds the sum."""
        number = self._post("all_reduce", buffer)
        self._next += 1  # for its second half
        return Posted(self, "all_reduce", number, buffer, buffer)

    def all_gather(self, whole: torch.Tensor, own: torch.Tensor, name: str = "") -> Posted:
        """Publish `own` (from `empty`, any dtype); `whole` (world size x its size, on the CPU) takes everybody's.
        name: of what is gathered; ranks that gather different things are told so."""
        return Posted(self, "all_gather", self._post("all_gather", own, name=name), whole, own, name)

    def _post(self, op: str, buffer: torch.Tensor, number: int | None = None, name: str = "") -> int:
        if number is None:
            number, self._next = self._next, self._next + 1
        if number > RING:
            self._until_done(number - RING)
        at = number % RING * SLOT_BYTES
        nbytes = buffer.numel() * buffer.element_size()
        label = zlib.crc32(name.encode())
        record = (_OPS.index(op), DTYPES.get(buffer.dtype, 0), self._offset(buffer), nbytes, time.monotonic_ns(), label)
        _RECORD.pack_into(self._own, at + _WORDS_BYTES, *record)
        native.post(self._base[self.rank] + at, number)
        return number

    def _done(self, number: int) -> None:
        native.post(self._base[self.rank] + number % RING * SLOT_BYTES + 4, number)

    def _until_posted(self, number: int, op: str, buffer: torch.Tensor, name: str) -> tuple[dict[int, int], int]:
        """Waits for all others. Returns the address of each one's buffer, and when the last was posted (ns)."""
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
                    f"the ranks issue different collectives: rank {self.rank} {_told(op, nbytes, name)}, rank {peer} "
                    f"{_told(_OPS[theirs], size, other)}. Do all ranks take the same way through the model?"
                )
            addresses[peer] = self._base[peer] + offset
            last_ns = max(last_ns, posted_ns)
        return addresses, last_ns

    def _until_done(self, number: int) -> None:
        for peer in self._peers:
            self._wait(peer, number % RING * SLOT_BYTES + 4, number)

    def _wait(self, peer: int, word: int, number: int) -> None:
        address, until = self._base[peer] + word, time.monotonic() + self.timeout_s
        while not native.wait(address, number, SLICE_US):
            if peer in self._alive and _ended(self._alive[peer]):
                if native.wait(address, number, 0):  # it posted, and ended
                    return
                raise ExchangeError(f"rank {peer} (pid {self._pids[peer]}) is gone; this rank was waiting for it")
            if time.monotonic() > until:
                raise ExchangeError(f"rank {peer} did not answer within {self.timeout_s:g} s")

    def _forget(self, peer: int, address: int, nbytes: int) -> None:
        """Let go of pages of another rank that were read: they are its memory, not this one's."""
        start = (address - self._base[peer]) // mmap.PAGESIZE * mmap.PAGESIZE
        self._peers[peer].madvise(mmap.MADV_DONTNEED, start, _up(address - self._base[peer] + nbytes - start))


class Posted:
    """A collective that this rank has published. After `wait` or `into` the figures are set."""

    def __init__(
        self, exchange: Exchange, op: str, number: int, target: torch.Tensor, own: torch.Tensor, name: str = ""
    ) -> None:
        self._name = name
        self._exchange, self._op, self._number, self._target, self._own = exchange, op, number, target, own
        self.issue_ns = time.monotonic_ns()
        self.end_ns = 0
        """When it was complete here: the last rank's posting, or ours, plus the time to read."""
        self.wait_ns = 0
        """How long this rank was held up by ranks that came later."""

    def wait(self) -> None:
        exchange = self._exchange
        if self._op == "all_gather":
            self._gather()
        elif self._op == "reduce_scatter":
            self.into(self._range(self._target, exchange.rank), add=False)
        else:
            self._reduce(self._range(self._target, exchange.rank), add=False)
            self._number = exchange._post("all_reduce, second half", self._target, self._number + 1)
            self._copy_ranges()

    def into(self, target: torch.Tensor, add: bool) -> None:
        """For a reduce-scatter: the own shard's sum in `target` (fp32 or 16 bit; it may be that range), or added there.
        The sum is taken in fp32 in the order of the ranks."""
        self._reduce(target, add)

    def fence(self) -> None:
        """Returns when all other ranks have read this rank's buffer."""
        self._exchange._until_done(self._number)

    def _range(self, buffer: torch.Tensor, rank: int) -> torch.Tensor:
        numel = buffer.numel() // self._exchange.world_size
        return buffer[rank * numel : (rank + 1) * numel]

    def _reduce(self, target: torch.Tensor, add: bool) -> None:
        exchange, buffer = self._exchange, self._own
        numel = buffer.numel() // exchange.world_size
        addresses, before = self._meet(buffer)
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
            exchange._forget(peer, addresses[peer] + begin * size, numel * size)
        self._finish(before)

    def _gather(self) -> None:
        exchange, own = self._exchange, self._own
        nbytes = own.numel() * own.element_size()
        addresses, before = self._meet(own)
        place = self._range(self._target, exchange.rank)
        if place.data_ptr() != own.data_ptr():
            place.copy_(own)
        for peer, address in addresses.items():
            ctypes.memmove(self._target.data_ptr() + peer * nbytes, address, nbytes)
            exchange._forget(peer, address, nbytes)
        self._finish(before)

    def _copy_ranges(self) -> None:
        """The second half of an all-reduce: every rank has summed its range, the others copy it."""
        exchange, buffer = self._exchange, self._target
        self._op = "all_reduce, second half"
        addresses, before = self._meet(buffer)
        nbytes = buffer.numel() // exchange.world_size * buffer.element_size()
        for peer, address in addresses.items():
            ctypes.memmove(buffer.data_ptr() + peer * nbytes, address + peer * nbytes, nbytes)
            exchange._forget(peer, address + peer * nbytes, nbytes)
        self._finish(before)

    def _meet(self, buffer: torch.Tensor) -> tuple[dict[int, int], int]:
        """Returns the others' addresses and the time (ns) at which reading can begin."""
        began = time.monotonic_ns()
        addresses, last_ns = self._exchange._until_posted(self._number, self._op, buffer, self._name)
        self._ready_ns = max(last_ns, self.issue_ns, self.end_ns)
        now = time.monotonic_ns()
        self.wait_ns += now - began
        return addresses, now

    def _finish(self, before: int) -> None:
        self._exchange._done(self._number)
        self.end_ns = self._ready_ns + time.monotonic_ns() - before


def _told(op: str, nbytes: int, name: str) -> str:
    return f"{op}{f' of {name}' if name else ''} ({nbytes:,} bytes)"


def _create(nbytes: int) -> tuple[mmap.mmap, int]:
    if not native.available():
        raise ImportError("the CPU kernels are not built")
    descriptor = os.memfd_create("zerotop-exchange", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _up(nbytes))
    return mmap.mmap(descriptor, _up(nbytes)), descriptor


def _map(about: dict[str, Any]) -> mmap.mmap:
    """Another rank's arena, read-only, through the descriptor that it still holds."""
    descriptor = os.open(f"/proc/{about['pid']}/fd/{about['fd']}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, about["nbytes"], prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _ended(pidfd: int) -> bool:
    """Whether the process has ended. poll, not select: a process with many files open has numbers beyond select's."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _host() -> tuple[str, str]:
    """Equal for processes that can find each other's descriptors: one kernel, one set of process numbers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")


def _up(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
