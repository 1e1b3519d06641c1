"""The parts of a process's RSS, from the kernel and malloc, and the peaks of its phases."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from runtime.host import heap, resident
from runtime.host.ledger import Ledger, host_ledger_bytes, memory_message, phase_peaks, zeros
from runtime.host.phase_peaks import PhasePeaks, Reading
from runtime.host.resident import CountedPages, FileMappings, outside_malloc, read_resident, reset_peak
from runtime.host.rss_parts import RssAccount
from zerotop.state.memory import memory_use

MIB = 1 << 20
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc")


@linux
def test_the_kinds_of_resident_memory_are_its_sum() -> None:
    found = read_resident()
    assert found is not None
    assert found.rss == found.anonymous + found.file + found.shared
    assert found.rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.03)
    assert found.peak >= found.rss


@linux
def test_a_peak_is_seen_once_and_begins_again_after_a_reset() -> None:
    assert reset_peak()
    before = read_resident()
    large = torch.ones(64 * MIB // 4)
    del large
    high = read_resident()
    assert before is not None and high is not None
    assert high.peak >= before.rss + 60 * MIB and high.rss < high.peak - 30 * MIB
    assert reset_peak()
    again = read_resident()
    assert again is not None and again.peak < high.peak - 30 * MIB


@linux
def test_every_part_is_measured_by_itself_and_they_add_up_to_the_rss() -> None:
    account, ledger = RssAccount(), Ledger()
    account.note_baseline()
    account.note_built(0)
    states = [
        ledger.hold("parameters", zeros(64 * MIB // 4, torch.float32, CPU).fill_(1)),  # pages of its own
        ledger.hold("gradients", torch.ones(32 * MIB // 4)),  # from malloc
    ]
    parts = account.parts(host_ledger_bytes(ledger, CPU))
    activations = torch.ones(48 * MIB // 4)
    more = account.parts(host_ledger_bytes(ledger, CPU))
    assert parts is not None and more is not None
    assert more.activations - parts.activations == pytest.approx(48 * MIB, abs=MIB)
    for one in (parts, more):
        assert abs(one.rest) <= 0.03 * one.rss
        named = sum(size for name, size in one.named().items() if name != "rest")
        assert named + host_ledger_bytes(ledger, CPU) == pytest.approx(one.rss, rel=0.03)
    assert account.heap_activations(host_ledger_bytes(ledger, CPU)) == pytest.approx(more.activations, abs=MIB)
    del activations, states


UNTOUCHED = """
import torch
from runtime.host.ledger import Ledger, host_ledger_bytes, zeros
from runtime.host.rss_parts import RssAccount
account, ledger, cpu = RssAccount(), Ledger(), torch.device("cpu")
account.note_baseline()
account.note_built(0)
held = ledger.hold("optimizer", zeros(16 << 20, torch.float32, cpu))
print(account.parts(host_ledger_bytes(ledger, cpu)).untouched)
held.fill_(1)
print(account.parts(host_ledger_bytes(ledger, cpu)).untouched)
"""


@linux
def test_pages_that_nothing_has_written_to_are_called_so() -> None:
    # In a process of its own: what earlier tests have left in this one's heap would stand against them.
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=True)
    before, after = (int(line) for line in done.stdout.split())
    assert before == pytest.approx(64 * MIB, abs=8 * MIB) and after < 8 * MIB


def test_tensors_with_pages_of_their_own_are_counted_as_long_as_they_live() -> None:
    before = outside_malloc.nbytes
    tensor = zeros(2 * MIB, torch.uint8, CPU)
    assert outside_malloc.nbytes == before + 2 * MIB
    view = tensor[:10]
    del tensor
    assert outside_malloc.nbytes == before + 2 * MIB
    del view
    assert outside_malloc.nbytes == before
    pages = CountedPages.make(3 * mmap.PAGESIZE)
    assert len(pages) == 3 * mmap.PAGESIZE and outside_malloc.nbytes == before + 3 * mmap.PAGESIZE
    del pages
    assert outside_malloc.nbytes == before


@linux
def test_mapped_data_is_told_apart_from_libraries(tmp_path: Path) -> None:
    before = read_resident()
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        assert before is not None and FileMappings().data_bytes(before.file) == 0
        assert sum(data[at] for at in range(0, len(data), mmap.PAGESIZE)) == 0
        now = read_resident()
        assert now is not None
        mappings = FileMappings()
        assert mappings.data_bytes(now.file) == pytest.approx(8 * MIB, rel=0.01)
    assert mappings.data_bytes(now.file - 8 * MIB) > 0, "it is not read again at once: that would cost too much"


def test_without_proc_there_are_no_figures_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "_STATUS", str(tmp_path / "status"))
    monkeypatch.setattr(resident, "_CLEAR_REFS", str(tmp_path / "clear_refs"))
    account, ledger = RssAccount(), Ledger()
    monkeypatch.setattr("runtime.host.ledger.account", lambda: account)
    account.note_baseline()
    account.note_built(0)
    assert read_resident() is None and not reset_peak() and account.parts(0) is None
    assert account.heap_activations(0) is None
    peaks = phase_peaks(CPU, ledger)
    peaks.phase_ended("forward", 0, 10**9)
    message = memory_message(0, ledger, CPU, peaks)
    assert message.rss_bytes > 0
    assert message.rss_parts == {} and message.peak_bytes == {} and message.untouched_bytes == 0


def test_another_c_library_has_no_figures_of_its_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_mallinfo", lambda: None)
    account = RssAccount()
    account.note_baseline()
    assert heap.heap_use() is None and account.parts(0) is None


# ---- peaks -----------------------------------------------------------------------------------------------------------
MS = 10**6


def peaks_of(readings: list[Reading | None], cost_ns: int = 1000) -> PhasePeaks:
    left, now = iter(readings), [0]

    def thread_ns() -> int:
        now[0] += cost_ns
        return now[0]

    return PhasePeaks(lambda: next(left), thread_ns)


def test_peaks_only_grow_each_in_its_phase() -> None:
    peaks = peaks_of([Reading(10, 4), Reading(30, 8), Reading(20, 9), Reading(15, 1)])
    seen = []
    for at, phase in enumerate(("forward", "backward", "forward", "backward")):
        peaks.phase_ended(phase, at * 10 * MS, (at + 1) * 10 * MS)  # type: ignore[arg-type]
        seen.append(dict(peaks.peaks))
    assert seen[-1] == {"forward": 20, "backward": 30} and peaks.activations == {"forward": 9, "backward": 8}
    assert all(one[phase] <= two[phase] for one, two in itertools.pairwise(seen) for phase in one)


def test_readings_take_a_thousandth_of_the_time_at_most_and_skipped_phases_count_with_the_next() -> None:
    peaks = peaks_of([Reading(10, 1), Reading(50, 2)], cost_ns=MS)
    peaks.phase_ended("forward", 0, 10 * MS)  # this reading costs 1 ms: the next one is due after 1 s
    peaks.phase_ended("backward", 10 * MS, 800 * MS)
    peaks.phase_ended("step", 800 * MS, 900 * MS)
    assert peaks.peaks == {"forward": 10}
    peaks.phase_ended("data", 900 * MS, 1100 * MS)
    assert peaks.peaks == {"forward": 10, "backward": 50}, "the longest of those that were not read"
    assert peaks.activations == {"forward": 1, "data": 2}


def test_a_phase_that_can_not_be_measured_has_no_peak() -> None:
    peaks = peaks_of([None])
    peaks.phase_ended("forward", 0, 10 * MS)
    assert peaks.peaks == {} and peaks.activations == {}


# ---- a GPU, played ---------------------------------------------------------------------------------------------------
class PlayedAllocator:
    """torch.cuda's figures of one GPU, as its allocator keeps them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        stats = {"reserved_bytes.all.current": 90, "num_alloc_retries": 3, "inactive_split_bytes.all.current": 7}
        played = {
            "memory_stats": lambda device: stats | {"allocated_bytes.all.current": self.now},
            "memory_stats_as_nested_dict": lambda device: {"allocated_bytes": {"all": {"peak": self.peak}}},
            "reset_peak_memory_stats": self._reset,
            "mem_get_info": lambda device: (20, 120),
        }
        for name, function in played.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def _reset(self, device: torch.device) -> None:
        self.peak = self.now


def test_a_gpu_s_parts_are_what_its_driver_says_is_used_and_its_peaks_begin_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, cuda, ledger = PlayedAllocator(monkeypatch), torch.device("cuda", 0), Ledger()
    ledger.add("parameters", 30)
    ledger.add("optimizer", 40, offloaded=True)
    gpu.take(30)
    peaks = phase_peaks(cuda, ledger)
    for at, (phase, top) in enumerate((("forward", 50), ("backward", 40), ("step", 5))):
        gpu.take(top)
        gpu.take(-top)
        peaks.phase_ended(phase, at * 10**9, (at + 1) * 10**9)  # type: ignore[arg-type]
    assert peaks.peaks == {"forward": 80, "backward": 70, "step": 35}
    assert peaks.activations == {"forward": 50, "backward": 40, "step": 5}
    gpu.take(15)
    message = memory_message(0, ledger, cuda, peaks)
    use = memory_use(message)
    assert dict(use.parts) == {"parameters": 30, "activations": 15, "cache": 45, "other": 10}
    assert sum(dict(use.parts).values()) == message.device_used_bytes == use.used_bytes == 100
    assert (message.alloc_retries, message.inactive_split_bytes) == (3, 7)
    assert message.peak_bytes == {"forward": 80, "backward": 70, "step": 35}
