"""Exact sizes, page-locking that ends before the mapping, and refusals that come before the allocation."""

from __future__ import annotations

import gc
import math
import mmap
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

from runtime import native  # noqa: E402
from runtime.host import pinned  # noqa: E402
from runtime.host.memory_limits import HostMemoryError, Limits, check_host_memory, read_limits  # noqa: E402
from runtime.host.pinned import Arena  # noqa: E402

PAGE = mmap.PAGESIZE
GIB = 1 << 30


def mapped(address: int) -> dict[str, int]:
    """Figures of the mapping at an address, in bytes, from /proc/self/smaps; empty when nothing is there."""
    figures: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
            if inside:
                figures["Size"] = high - low
        elif inside and line.endswith(" kB"):
            figures.setdefault(head[:-1], int(line.split()[1]) * 1024)
    return figures


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What CUDA is asked for, in order; an entry for a mapping that is gone already would be a crash on a GPU box."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(pinned, "_has_kernels", lambda: True)
    monkeypatch.setattr(native, "pin", lambda address, nbytes, device: calls.append(("pin", address)))

    def unpin(address: int) -> None:
        assert mapped(address), "unregistered after it was unmapped"
        calls.append(("unpin", address))

    monkeypatch.setattr(native, "unpin", unpin)
    return calls


@pytest.mark.parametrize("numel", [1, 1024, 1025, 5_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_takes_whole_pages_and_no_more(numel: int, dtype: torch.dtype) -> None:
    with Arena(pin=False) as arena:
        tensor = arena.zeros(numel, dtype)
        nbytes = numel * dtype.itemsize
        assert tensor.shape == (numel,) and tensor.dtype == dtype and not tensor.any()
        assert arena.requested_bytes == nbytes and tensor.data_ptr() % PAGE == 0
        assert arena.real_bytes == -(-nbytes // PAGE) * PAGE
        tensor.fill_(2)
        assert tensor.sum(dtype=torch.float64) == 2 * numel


def test_pages_are_in_memory_before_they_are_used() -> None:
    with Arena(pin=False, nodes=[0], threads=2) as arena:
        tensor = arena.zeros(5_000_000, torch.float32)
        assert mapped(tensor.data_ptr())["Rss"] >= arena.real_bytes


def test_nothing_takes_nothing() -> None:
    arena = Arena(pin=False)
    assert arena.zeros(0, torch.float32).numel() == 0
    assert arena.requested_bytes == arena.real_bytes == 0


def test_close_ends_page_locking_and_leaves_tensors_valid(cuda: list[tuple[str, int]]) -> None:
    arena = Arena()
    tensor = arena.zeros(300_000, torch.float32).fill_(3)
    address = tensor.data_ptr()
    assert cuda == [("pin", address)]
    arena.close()
    assert cuda == [("pin", address), ("unpin", address)]
    assert arena.requested_bytes == arena.real_bytes == 0
    view = tensor[7:9]
    del tensor
    gc.collect()
    assert view.tolist() == [3.0, 3.0], "the mapping went away under a tensor"
    del view
    gc.collect()
    arena.close()
    assert len(cuda) == 2


def test_memory_goes_back_when_nobody_holds_it() -> None:
    arena = Arena(pin=False)
    tensor = arena.zeros(30_000_000, torch.float32)
    address = tensor.data_ptr()
    assert mapped(address)["Rss"] >= 120_000_000
    del tensor
    assert mapped(address), "the arena holds what it gave out"
    arena.close()
    gc.collect()
    assert mapped(address).get("Rss", 0) < 120_000_000


def test_a_forgotten_arena_unregisters_too(cuda: list[tuple[str, int]]) -> None:
    arena = Arena()
    tensor = arena.zeros(10, torch.float32)
    kept = arena.zeros(10, torch.float32)
    del tensor, arena
    gc.collect()
    assert [kind for kind, _ in cuda] == ["pin", "pin", "unpin", "unpin"]
    assert kept.tolist() == [0.0] * 10


def test_a_refused_registration_takes_nothing(monkeypatch: pytest.MonkeyPatch, cuda: list[tuple[str, int]]) -> None:
    def refuse(address: int, nbytes: int, device: int) -> None:
        raise RuntimeError("CUDA: out of memory (error 2)")

    monkeypatch.setattr(native, "pin", refuse)
    arena = Arena()
    with pytest.raises(RuntimeError, match="out of memory"):
        arena.zeros(1000, torch.float32)
    assert arena.requested_bytes == arena.real_bytes == 0 and cuda == []


def test_a_child_has_no_copy_of_page_locked_memory(cuda: list[tuple[str, int]]) -> None:
    with Arena() as arena:
        address = arena.zeros(1_000_000, torch.float32).data_ptr()
        flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")]
        assert mapped(address) and any(" dc " in f"{line} " for line in flags)


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def test_a_7b_models_states_take_what_they_hold() -> None:
    n = 7_000_000_000
    states = [4 * n] * 3  # fp32 master, exp_avg, exp_avg_sq
    assert pinned.page_rounded(states) - sum(states) < 3 * PAGE
    # DeepSpeed's stage 2 offload adds an fp32 gradient and the 16-bit copy: 18 bytes per parameter, in five blocks.
    deepspeed = [4 * n] * 4 + [2 * n]
    assert sum(deepspeed) == 18 * n
    assert round(pinned.page_rounded(deepspeed) / GIB) == 117
    assert pinned.power_of_two_rounded(deepspeed) == 144 * GIB


def test_rounding() -> None:
    assert pinned.page_rounded([0, 1, 4096, 4097], page=4096) == 4096 * 4
    assert pinned.power_of_two_rounded([0, 1, 4096, 4097]) == 1 + 4096 + 8192
    assert pinned.power_of_two_rounded([26 * GIB]) == 32 * GIB


# ---- limits ----------------------------------------------------------------------------------------------------------
def write(root: Path, files: dict[str, str]) -> Path:
    meminfo = "MemTotal:       65536000 kB\nMemAvailable:   50000000 kB\nSwapFree:        1000 kB"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "limit", "left"),
    [
        ({}, math.inf, math.inf),
        (
            {
                "proc/self/cgroup": "0::/job/step",
                "sys/fs/cgroup/job/memory.max": "1000000",
                "sys/fs/cgroup/job/memory.current": "700000",
                "sys/fs/cgroup/job/memory.stat": "anon 300000\ninactive_file 250000\nactive_file 50000",
                "sys/fs/cgroup/job/step/memory.max": "max",
                "sys/fs/cgroup/job/step/memory.current": "100",
            },
            1_000_000,
            600_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n0::/",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "900000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "950000",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "950000",
            },
            900_000,
            50_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/docker/abc",
                "sys/fs/cgroup/memory.max": "4096",
                "sys/fs/cgroup/memory.current": "8192",
            },
            4096,
            0,
        ),
    ],
    ids=["none", "v2-parent", "v1", "v2-container"],
)
def test_limits_are_read(tmp_path: Path, files: dict[str, str], limit: float, left: float) -> None:
    limits = read_limits(write(tmp_path, files))
    assert (limits.group_limit_bytes, limits.group_left_bytes) == (limit, left)
    assert limits.available_bytes == 50_000_000 * 1024 and limits.swap_bytes == 1000 * 1024


def limits(**changes: float) -> Limits:
    start = Limits(100 * GIB, 8 * GIB, math.inf, math.inf, math.inf)
    return start._replace(**changes)


def test_what_fits_is_let_through() -> None:
    assert check_host_memory(25 * GIB, pin=True, local_world=4, limits=limits()) is None
    assert check_host_memory(107 * GIB, pin=False, limits=limits()) is None, "plain memory can be swapped out"


def test_a_control_group_refuses_with_numbers_and_a_way_out() -> None:
    with pytest.raises(HostMemoryError) as refusal:
        check_host_memory(
            12 * GIB, pin=True, local_world=8, limits=limits(group_limit_bytes=96 * GIB, group_left_bytes=90 * GIB)
        )
    assert str(refusal.value) == (
        "offload needs 8 ranks x 12.0 GiB = 96.0 GiB of page-locked host memory, but of this control group's limit of "
        "96.0 GiB only 90.0 GiB are left. Raise the limit (docker run --memory, Slurm --mem), use fewer ranks on this "
        "host or a higher ZeRO stage over more hosts, or offload less."
    )


def test_a_machine_refuses() -> None:
    with pytest.raises(HostMemoryError, match=r"needs 101\.0 GiB of page-locked .* has only 100\.0 GiB of memory left"):
        check_host_memory(101 * GIB, pin=True, limits=limits())
    with pytest.raises(HostMemoryError, match=r"needs 109\.0 GiB of host .* only 108\.0 GiB of memory and swap left"):
        check_host_memory(109 * GIB, pin=False, limits=limits())


def test_a_small_memlock_limit_is_told_and_no_refusal() -> None:
    small = limits(memlock_bytes=8 << 20)
    note = check_host_memory(GIB, pin=True, limits=small)
    assert note is not None and "ulimit -l is 8.0 MiB, but each rank page-locks 1.0 GiB" in note
    assert check_host_memory(GIB, pin=False, limits=small) is None


def test_this_machine_has_a_mebibyte() -> None:
    assert check_host_memory(1 << 20, pin=False) is None
    with pytest.raises(HostMemoryError):
        check_host_memory(1 << 60, pin=False)


def test_page_locking_is_torchs_where_our_library_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for a newer CUDA than the driver's, it loads and finds no GPU; torch's own CUDA may be older."""

    class Cudart:
        calls: ClassVar[list[tuple[str, int]]] = []

        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            self.calls.append(("register", address))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            self.calls.append(("unregister", address))
            return 0

    monkeypatch.setattr(native, "cuda", lambda: None)
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(native, "pin", lambda *_: pytest.fail("our library can't"))
    pinned._has_kernels.cache_clear()
    try:
        pinned.page_lock(4096, 4096, 0)
        pinned.page_unlock(4096)
    finally:
        pinned._has_kernels.cache_clear()
    assert Cudart.calls == [("register", 4096), ("unregister", 4096)]
