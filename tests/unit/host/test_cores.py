"""Ranks share a host's cores: none twice, none idle, near memory and GPU. Machines are made-up /sys trees."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.host.cores import Core, Machine, Share, gpu_node, read_machine, share


def machine(nodes: int, cores: int, smt: int = 1, quota: float = math.inf) -> Machine:
    """Numbered as Linux does: all first siblings, then all second ones."""
    total = nodes * cores
    return Machine(
        tuple(Core(c // cores, tuple(c + total * s for s in range(smt))) for c in range(total)), quota_cpus=quota
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def tree(root: Path, *, nodes: int, cores: int, smt: int) -> Path:
    total = nodes * cores
    files = {}
    for node in range(nodes):
        first = [f"{node * cores + total * s}-{(node + 1) * cores - 1 + total * s}" for s in range(smt)]
        files[f"sys/devices/system/node/node{node}/cpulist"] = ",".join(first)
    for cpu in range(total * smt):
        siblings = ",".join(str(cpu % total + total * s) for s in range(smt))
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"] = siblings
    return write(root, files)


def test_a_tree_is_read_as_it_is(tmp_path: Path) -> None:
    root = tree(tmp_path, nodes=2, cores=4, smt=2)
    assert read_machine(root, set(range(16))) == machine(2, 4, smt=2)
    # A cpuset that leaves one sibling of core 0, none of core 1, and half of node 1.
    some = read_machine(root, {0, 2, 10, 4, 12, 5, 13})
    assert some.cores == (Core(0, (0,)), Core(0, (2, 10)), Core(1, (4, 12)), Core(1, (5, 13)))


def test_a_machine_that_tells_nothing_has_one_node_of_single_cores(tmp_path: Path) -> None:
    assert read_machine(tmp_path, {0, 3}) == Machine((Core(0, (0,)), Core(0, (3,))), math.inf)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1.0,
        ),
        ({"proc/self/cgroup": "0::/docker/xyz", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        (
            {
                "proc/self/cgroup": "3:memory:/\n2:cpu,cpuacct:/job",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "50000",
            },
            3.0,
        ),
        ({"proc/self/cgroup": "2:cpu:/job", "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1"}, math.inf),
    ],
    ids=["v2-none", "v2", "v2-parent", "v2-container", "v1", "v1-none"],
)
def test_cgroup_quotas(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    assert read_machine(write(tmp_path, files), {0}).quota_cpus == quota


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 2), st.integers(1, 12), st.data())
def test_no_cpu_is_given_twice_and_none_is_left(
    nodes: int, cores: int, smt: int, world: int, data: st.DataObject
) -> None:
    gpus = data.draw(st.lists(st.one_of(st.none(), st.integers(0, nodes - 1)), min_size=world, max_size=world))
    host = machine(nodes, cores, smt)
    parts = [share(rank, world, host, gpu_nodes=gpus) for rank in range(world)]
    given_out = sorted(cpu for part in parts for cpu in part.cpus)
    if world <= nodes * cores * smt:
        assert given_out == sorted(cpu for core in host.cores for cpu in core.cpus)
        assert sum(part.threads for part in parts) == (nodes * cores if world <= nodes * cores else nodes * cores * smt)
    else:
        assert all(part.threads == 1 and len(part.cpus) == 1 for part in parts)
    counts = [part.threads for part in parts]
    assert max(counts) - min(counts) <= 1


def test_ranks_lie_on_one_node_where_they_divide() -> None:
    parts = [share(rank, 4, machine(2, 4, smt=2)) for rank in range(4)]
    assert parts[0] == Share((0, 1, 8, 9), (0,), 2)
    assert [part.nodes for part in parts] == [(0,), (0,), (1,), (1,)]
    assert share(0, 1, machine(2, 4)).nodes == (0, 1)


def test_a_rank_is_near_its_gpu() -> None:
    host = machine(2, 4)
    parts = [share(rank, 4, host, gpu_nodes=[1, 1, 0, 0]) for rank in range(4)]
    assert [part.nodes for part in parts] == [(1,), (1,), (0,), (0,)]
    # Both GPUs on one node: the second rank takes the other node's cores, rather than none using them.
    assert [share(rank, 2, host, gpu_nodes=[1, 1]).nodes for rank in range(2)] == [(1,), (0,)]
    assert [share(rank, 2, host, gpu_nodes=[None, 0]).nodes for rank in range(2)] == [(1,), (0,)]


def test_siblings_come_into_play_when_cores_run_out() -> None:
    parts = [share(rank, 4, machine(1, 2, smt=2)) for rank in range(4)]
    assert [part.cpus for part in parts] == [(0,), (2,), (1,), (3,)]


def test_a_quota_limits_threads_and_not_the_mask() -> None:
    part = share(0, 2, machine(1, 8, quota=5.0))
    assert part.threads == 2 and part.cpus == (0, 1, 2, 3)
    assert share(0, 8, machine(1, 8, quota=2.0)).threads == 1


def test_wrong_ranks_are_named() -> None:
    with pytest.raises(ValueError, match="local rank 2 of 2"):
        share(2, 2, machine(1, 2))
    with pytest.raises(ValueError, match="1 GPU nodes for 2 ranks"):
        share(0, 2, machine(1, 2), gpu_nodes=[0])


def test_the_node_of_a_gpu(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:17:00.0/numa_node": "1",
            "sys/bus/pci/devices/0001:65:00.0/numa_node": "-1",
        },
    )
    assert gpu_node("00000000:17:00.0", root) == gpu_node("0000:17:00.0", root) == 1
    assert gpu_node("00000001:65:00.0", root) is None and gpu_node("00000000:99:00.0", root) is None


def test_bind_moves_threads_that_run_and_threads_to_come() -> None:
    code = """
import os, threading
from runtime.host.cores import Share, bind
started, go, seen = threading.Event(), threading.Event(), []
def early():
    started.set(); go.wait(); seen.append(os.sched_getaffinity(0))
thread = threading.Thread(target=early); thread.start(); started.wait()
cpu = min(os.sched_getaffinity(0))
assert bind(Share((cpu,), (0,), 1)) == 1
go.set(); thread.join()
late = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0))); late.start(); late.join()
assert seen == [{cpu}, {cpu}] and os.sched_getaffinity(0) == {cpu}, seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_this_machine() -> None:
    here = read_machine()
    assert {cpu for core in here.cores for cpu in core.cpus} == os.sched_getaffinity(0)
    assert 1 <= share(0, 1).threads <= len(here.cores)
