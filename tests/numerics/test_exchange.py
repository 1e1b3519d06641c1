"""Collectives through shared memory: sums and gathers are exact, buffers are not overwritten early, and ranks that part
ways or die are named."""

from __future__ import annotations

import gc
import os
import resource
import signal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import native
from runtime.comm.shared_memory import RING, Exchange, ExchangeError
from runtime.engine.initialize import initialize
from tests.harness.waiting import patient
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch


def opened(nbytes: int = 1 << 24, timeout_s: float = 60) -> Exchange:
    rank, world = dist.get_rank(), dist.get_world_size()

    def gather(value: object) -> list[object]:
        values: list[object] = [None] * world
        dist.all_gather_object(values, value)
        return values

    exchange = Exchange.open(rank, world, nbytes, gather, timeout_s)
    assert exchange is not None
    return exchange


def value_of(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed * 100 + rank)).to(dtype)


# ---- right results ---------------------------------------------------------------------------------------------------
def every_collective(dtype: torch.dtype, per_rank: int) -> None:
    exchange, rank, world = opened(), dist.get_rank(), dist.get_world_size()
    numel = per_rank * world
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    total = torch.zeros(numel)
    for other in range(world):
        total += value_of(other, numel, dtype).float()
    buffer = exchange.empty(numel, dtype).copy_(value_of(rank, numel, dtype))
    assert exchange.holds(buffer) and exchange.holds(buffer[own]) and not exchange.holds(torch.empty(4))
    target = torch.full((per_rank,), 2.0)
    posted = exchange.reduce_scatter(buffer)
    posted.into(target, add=True)
    posted.fence()
    assert torch.equal(target, 2.0 + total[own])
    posted = exchange.reduce_scatter(buffer)
    posted.wait()
    assert torch.equal(buffer[own], total[own].to(dtype))
    posted.fence()
    buffer.copy_(value_of(rank, numel, dtype))
    posted = exchange.all_reduce(buffer)
    posted.wait()
    posted.fence()
    assert torch.equal(buffer, total.to(dtype))
    buffer[own].copy_(value_of(rank, per_rank, dtype))
    exchange.all_gather(buffer, buffer[own]).wait()
    assert torch.equal(buffer, torch.cat([value_of(other, per_rank, dtype) for other in range(world)]))
    apart, elsewhere = exchange.empty(per_rank, torch.int16).fill_(rank), torch.empty(numel, dtype=torch.int16)
    exchange.all_gather(elsewhere, apart).wait()
    assert elsewhere.tolist() == [other for other in range(world) for _ in range(per_rank)]
    dist.barrier()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "per_rank"), [(2, 64), (2, 100_003), (3, 4097), (4, 1)])
def test_every_collective(ranks, world, per_rank, dtype):
    ranks(world).run(every_collective, dtype, per_rank)


def many_with_skew() -> None:
    """More than the ring holds, through two buffers, one rank now and then late, waits out of order."""
    exchange, rank, world = opened(), dist.get_rank(), dist.get_world_size()
    buffers = [exchange.empty(world * 64, torch.float32) for _ in range(2)]
    whole, own = torch.empty(world * 3), exchange.empty(3, torch.float32)
    last: list[object] = [None, None]
    for number in range(RING + 200):
        turn = number % 2
        if last[turn] is not None:
            last[turn].fence()
        buffers[turn].fill_(number + rank)
        reducing = exchange.reduce_scatter(buffers[turn])
        if number % 50 == rank:
            torch.randn(400, 400) @ torch.randn(400, 400)
        if number % 7 == 0:
            own.fill_(number * 10 + rank)
            gathering = exchange.all_gather(whole, own)
            gathering.wait()
            gathering.fence()
            assert whole.tolist() == [number * 10.0 + other for other in range(world) for _ in range(3)]
        out = torch.empty(64)
        reducing.into(out, add=False)
        assert (out == sum(number + other for other in range(world))).all()
        last[turn] = reducing
    assert reducing.wait_ns >= 0 and reducing.end_ns >= reducing.issue_ns
    dist.barrier()


def test_more_than_the_ring_holds(ranks):
    ranks(3).run(many_with_skew)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5000), st.integers(1, 4), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_sum_has_the_same_bits_everywhere(numel, count, add, source, target):
    sources = [value_of(index, numel + 3, source) for index in range(count)]
    start = value_of(9, numel, target)
    exact = sum((tensor.float() for tensor in sources[1:]), sources[0].float())[3:]
    expected = ((start.float() + exact) if add else exact).to(target)
    for isa in filter(native.isa, ("avx512", "avx2", "sve", "generic")):
        for threads in (1, 3):
            found = start.clone()
            addresses = [tensor.data_ptr() for tensor in sources]
            native.sum_into(found, addresses, 3, str(source), add=add, threads=threads, isa=isa)
            assert torch.equal(found, expected), (isa, threads)


# ---- memory ----------------------------------------------------------------------------------------------------------
def readers_let_go() -> tuple[int, int]:
    """Resident shared bytes after reading another rank's buffer, and after our own buffer was released."""
    nbytes = 1 << 26
    exchange = opened(4 * nbytes)
    buffer = exchange.empty(nbytes // 4, torch.float32).fill_(1.0)
    dist.barrier()
    before = resident_shared()
    exchange.reduce_scatter(buffer).wait()
    dist.barrier()
    after_read = resident_shared() - before
    exchange.release(buffer)
    after_release = resident_shared() - before
    again = exchange.empty(nbytes // 4, torch.float32)
    assert again.data_ptr() == buffer.data_ptr()
    return after_read, after_release + nbytes


def resident_shared() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssShmem"))


def test_another_ranks_pages_do_not_count_as_ours(ranks):
    for after_read, after_release in ranks(2).run(readers_let_go):
        assert after_read < 1 << 20
        assert after_release < 1 << 20


# ---- ranks that don't play along -------------------------------------------------------------------------------------
def parted_ways() -> str:
    exchange, rank = opened(), dist.get_rank()
    buffer = exchange.empty(128, torch.float32).fill_(0.0)
    posted = exchange.reduce_scatter(buffer) if rank == 0 else exchange.all_gather(torch.empty(256), buffer)
    with pytest.raises(ExchangeError, match="different collectives") as caught:
        posted.wait()
    dist.barrier()
    return str(caught.value)


def test_ranks_that_part_ways_are_told(ranks):
    first, second = ranks(2).run(parted_ways)
    assert "rank 0 reduce_scatter (512 bytes), rank 1 all_gather (512 bytes)" in first
    assert "rank 1 all_gather (512 bytes), rank 0 reduce_scatter (512 bytes)" in second


def one_dies() -> str:
    exchange, rank = opened(), dist.get_rank()
    buffer = exchange.empty(192, torch.float32).fill_(0.0)
    exchange.reduce_scatter(buffer).wait()
    if rank == 1:
        return str(os.getpid())
    try:
        exchange.reduce_scatter(buffer).wait()
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_a_killed_rank_is_an_error_on_the_others(ranks):
    group = ranks(3)
    for pipe in group._pipes:
        pipe.send((one_dies, ()))
    _, pid = group._pipes[1].recv()
    os.kill(int(pid), signal.SIGKILL)
    try:
        for rank in (0, 2):
            assert group._pipes[rank].poll(patient(30))
            assert group._pipes[rank].recv() == (
                True, f"rank 1 (pid {pid}) is gone; this rank was waiting for it"
            )  # fmt: skip
    finally:
        group.broken = True


def refused(reason: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()

    def gather(value: object) -> list[object]:
        values: list[object] = [None] * world
        dist.all_gather_object(values, value)
        return values

    import runtime.comm.shared_memory as module

    before = module.host_id
    if reason == "hosts":
        module.host_id = lambda: (f"host {rank}", "")
    elif rank == 1:

        def fail() -> tuple[str, str]:
            raise OSError("no memory files here")

        module.host_id = fail
    try:
        assert Exchange.open(rank, world, 4096, gather) is None
    finally:
        module.host_id = before


@pytest.mark.parametrize("reason", ["hosts", "one rank cannot"])
def test_all_or_none_get_an_exchange(ranks, reason):
    ranks(2).run(refused, reason)


def make_and_drop(engines: int) -> tuple[int, int]:
    """Open descriptors after the first and after the last of several engines that are no longer used."""
    counts = []
    for _ in range(engines):
        engine = initialize(model=make("plain"), config=config(3, 1, clip=0.0))[0]
        engine.backward(engine(*micro_batch(0, 0, dist.get_rank(), 2)))
        engine.step()
        del engine
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[0], counts[-1]


def test_engines_that_are_dropped_leave_no_descriptors(ranks):
    for first, last in ranks(2).run(make_and_drop, 4):
        assert last <= first


def many_open_files() -> float:
    """Descriptors beyond 1024, which select() can't take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        engine = initialize(model=make("plain"), config=config(2, 1, clip=0.0))[0]
        if dist.get_rank() == 1:
            assert engine.comm._exchange is not None
            # Nobody posts this: the other rank, which goes on, comes to wait for us and looks whether we live.
            native.wait(engine.comm._exchange._base[1], 2**31 - 1, 300_000)
        loss = engine(*micro_batch(0, 0, dist.get_rank(), 2))
        engine.backward(loss)
        engine.step()
        return float(loss)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes_with_many_open_files(ranks):
    assert all(0 < loss < 10 for loss in ranks(2).run(many_open_files))
