"""The memory of a node, read from files like those of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from zerotop.probe.memory import PAGE_BYTES, MemoryProbe

MEMINFO = "MemTotal: 1000 kB\nMemAvailable: 600 kB\nCached: 300 kB\nShmem: 100 kB\nSwapFree: 0 kB\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/vmstat").write_text("pgfault 9\npswpin 100\npswpout 7\n")
    (tmp_path / "proc/pressure/memory").write_text("some avg10=12.34 avg60=0.00 total=5\nfull avg10=1.00 total=2\n")
    return tmp_path


def test_figures_and_rates(root: Path) -> None:
    times = iter([10.0, 12.0, 12.0])
    probe = MemoryProbe(root, clock=lambda: next(times))
    first = probe.sample()
    assert first["ram_available_bytes"] == 600 * 1024 and first["shared_memory_bytes"] == 100 * 1024
    assert first["page_cache_bytes"] == 200 * 1024, "shared memory can't be dropped"
    assert first["memory_pressure_percent"] == 12.34
    assert first["cgroup_limit_bytes"] is None and first["swap_in_bytes_per_s"] is None
    (root / "proc/vmstat").write_text("pswpin 300\npswpout 7\n")
    second = probe.sample()
    assert second["swap_in_bytes_per_s"] == 100 * PAGE_BYTES and second["swap_out_bytes_per_s"] == 0
    assert probe.sample()["swap_in_bytes_per_s"] is None, "no time has passed"


def test_a_control_group_leaves_less(root: Path) -> None:
    group = root / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (group / "memory.max").write_text(f"{500 * 1024}\n")
    (group / "memory.current").write_text(f"{400 * 1024}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {100 * 1024}\nactive_file 0\n")
    found = MemoryProbe(root).sample()
    assert found["cgroup_limit_bytes"] == 500 * 1024 and found["cgroup_used_bytes"] == 300 * 1024
    assert found["ram_available_bytes"] == 200 * 1024
    assert found["memory_pressure_percent"] == 12.34
    (group / "memory.pressure").write_text("some avg10=40.00 avg60=0.00 total=5\n")
    assert MemoryProbe(root).sample()["memory_pressure_percent"] == 40.0, "that of the group is higher"


def test_without_these_files_every_figure_is_missing(tmp_path: Path) -> None:
    found = MemoryProbe(tmp_path).sample()
    assert found and all(value is None for value in found.values())
