"""Kills by the kernel for lack of memory, from played control groups and kernel logs, and what is advised after one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.config import load
from runtime.plan import find, plan
from runtime.plan.workload import built_in_workload
from runtime.wire.messages import Hello, Memory
from runtime.wire.node import GpuStats, NodeStats
from runtime.wire.rundir import RunFile
from runtime.wire.sizes import format_size
from zerotop.diagnose.evidence import EvidenceCollector
from zerotop.diagnose.oomkill import MemoryWatch
from zerotop.probe.xid import Xid
from zerotop.state.run import RunState

GIB = 2**30


def play(root: Path, *, v2: int | None = None, v1: int | None = None, machine: int | None = None) -> Path:
    """/proc and /sys with these counters."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("4:memory:/job\n0::/user/job\n")
    if v2 is not None:
        folder = root / "sys/fs/cgroup/user/job"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.events").write_text(f"low 0\nhigh 0\nmax 12\noom 1\noom_kill {v2}\noom_group_kill 0\n")
        # Those above count what happens beside us, too.
        (folder.parent / "memory.events").write_text(f"oom_kill {v2 + 5}\n")
    if v1 is not None:
        folder = root / "sys/fs/cgroup/memory/job"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {v1}\n")
    if machine is not None:
        (root / "proc/vmstat").write_text(f"nr_free_pages 7\noom_kill {machine}\npgfault 3\n")
    return root


def node(used: int = 5 * GIB, rss: dict[int, int] | None = None, **more: Any) -> NodeStats:
    return NodeStats(
        host="box",
        cpu_percent=1,
        cpu_count=2,
        load_1m=0,
        ram_used_bytes=used,
        ram_total_bytes=12 * GIB,
        rank_rss_bytes=rss or {},
        at_ns=0,
        wall_s=0,
        **more,
    )


@pytest.mark.parametrize(
    ("before", "after", "evidence"),
    [
        ({"v2": 0}, {"v2": 1}, "the kernel ran out of memory (oom_kill of the cgroup 0 -> 1)"),
        ({"v2": 3}, {"v2": 3}, ""),
        ({"v1": 1}, {"v1": 2}, "the kernel ran out of memory (oom_kill of the cgroup 1 -> 2)"),
        ({"v2": 0, "machine": 4}, {"v2": 0, "machine": 5}, ""),  # somebody else's
        (
            {"machine": 4},
            {"machine": 5},
            "the kernel killed a process for lack of memory (oom_kill of this machine 4 -> 5)",
        ),
        ({}, {}, ""),
    ],
)
def test_the_kernels_counters(tmp_path: Path, before: dict[str, int], after: dict[str, int], evidence: str) -> None:
    watch = MemoryWatch(play(tmp_path, **before))
    play(tmp_path, **after)
    memory = watch.seen({}, {})
    assert memory.evidence == memory.killed(0) == evidence
    assert memory.told == bool(before)


def test_the_kernels_log_names_the_rank(tmp_path: Path) -> None:
    play(tmp_path, machine=0)
    (tmp_path / "dev").mkdir()
    watch = MemoryWatch(tmp_path)
    play(tmp_path, machine=2)
    now_us = time.monotonic_ns() // 1000
    held = "anon-rss:6291456kB, file-rss:1kB, shmem-rss:1048576kB"
    line = f"Out of memory: Killed process {{pid}} (python) total-vm:99kB, {held}"
    records = [(1, line.format(pid=71)), (now_us, "usb 1-1: new device"), (now_us, line.format(pid=72))]
    (tmp_path / "dev/kmsg").write_text("".join(f"3,{n},{at},-;{text}\n" for n, (at, text) in enumerate(records)))
    memory = watch.seen({0: 71, 1: 72}, {})
    assert "killed process 72, which held 7.00 GiB" in memory.killed(1)
    assert set(memory.named) == {1}  # 71 was killed long before, and its number belongs to another now


def test_what_was_held_is_what_was_held_before_the_kill(tmp_path: Path) -> None:
    root = play(tmp_path, v2=0)
    watch = MemoryWatch(root)
    watch.note(node(11 * GIB, {0: 5 * GIB, 1: 6 * GIB}))
    watch.note(node(2 * GIB, {0: 1 * GIB}))  # rank 1 is gone
    memory = watch.seen({}, {2: GIB // 2, 0: 3})
    assert memory.rank_rss_bytes == {0: 1 * GIB, 1: 6 * GIB, 2: GIB // 2}
    assert memory.held == "ranks held 7.50 GiB of 12.0 GiB"
    # Before any rank has said hello there is what all processes held; and a group's limit counts where it is lower.
    group = root / "sys/fs/cgroup/user/job"
    for name, text in {"memory.max": str(4 * GIB), "memory.current": "1", "memory.stat": "inactive_file 0"}.items():
        (group / name).write_text(f"{text}\n")
    early = MemoryWatch(root)
    early.note(node(run_rss_bytes=3 * GIB))
    early.note(node(run_rss_bytes=GIB))
    assert early.seen({}, {}).held == "the run held 3.00 GiB of 4.00 GiB"


def test_shared_memory_is_named_with_the_least_that_was_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([16000, 0, 16000])
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs(16384, next(free)))
    watch = MemoryWatch()
    for _ in range(3):
        watch.note(node())
    assert watch.seen({}, {}).shared == "/dev/shm has 64.0 MiB, 0 B free"


def statvfs(blocks: int, free: int) -> os.statvfs_result:
    return os.statvfs_result((4096, 4096, blocks, free, free, 0, 0, 0, 0, 255))


# ---- an attempt ------------------------------------------------------------------------------------------------------
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "zero_optimization": {"stage": 1},
    "zerotop": {"model": {"preset": "gpt-small"}, "data": {"seq_len": 512}},
}


def launched(folder: Path, device: str = "cpu", script: list[str] | None = None, **more: Any) -> RunFile:
    config = load(CONFIG | more).resolve(2, device, script=script is not None)  # type: ignore[arg-type]
    (folder / "resolved.json").write_text(config.to_json())
    return RunFile(
        name="r",
        created_wall_s=0,
        attempt=1,
        host="box",
        boot_id="",
        nproc=2,
        device=device,
        config_path="",
        config_folder=str(folder),
        script=script,
        sockets="",
    )


def hello(rank: int, folder: Path, **more: Any) -> Hello:
    from runtime.config import Resolved

    digest = Resolved.from_json((folder / "resolved.json").read_bytes()).digest()
    fields: dict[str, Any] = {
        "run": "r", "attempt": 1, "rank": rank, "local_rank": rank, "world_size": 2, "host": "box", "pid": 100 + rank,
        "boot_id": "", "wall_s": 0, "mono_ns": 0, "device": "cpu", "config_digest": digest, "stage": 1,
        "precision": "fp32", "micro_batch": 4, "accumulation": 4, "global_batch": 32, "parameters": 10**8,
    }  # fmt: skip
    return Hello(**fields | more)


def state_of(*hellos: Hello) -> RunState:
    state = RunState()
    for one in hellos:
        state.rank(one.rank).hello = one
        state.rank(one.rank).memory = Memory(
            rank=one.rank, ledger={"parameters": GIB}, rss_bytes=3 * GIB, host_total_bytes=12 * GIB, at_ns=0
        )
    return state


def test_after_a_kill_the_plan_says_what_to_change(tmp_path: Path) -> None:
    root = play(tmp_path / "root", v2=0)
    run = launched(tmp_path)
    collector = EvidenceCollector(run, tmp_path, root)
    state = state_of(hello(0, tmp_path), hello(1, tmp_path))
    assert collector.collect(state).remedies.lines == ()  # nothing happened
    play(root, v2=1)
    account = collector.collect(state)
    assert account.memory.held == ""  # the probe never looked: of how much is not known
    batch = next(line for line in account.remedies.lines if '"train_micro_batch_size_per_gpu": 4 -> 2' in line)
    assert account.remedies.first.startswith(account.remedies.lines[0].removeprefix("1. ").partition(": saves")[0])
    # As planned: half of what both ranks' activations and logits take.
    config = load(CONFIG).resolve(2, "cpu")
    workload = built_in_workload(config, tmp_path)
    assert workload is not None
    layout = find(plan(workload), 1)
    assert f"saves about {format_size(layout.gpu['activations'] + layout.gpu['logits'])} on this host" in batch


def test_a_scripts_model_has_figures_for_its_states_alone(tmp_path: Path) -> None:
    root = play(tmp_path / "root", v2=0)
    collector = EvidenceCollector(launched(tmp_path, script=["mine.py"]), tmp_path, root)
    play(root, v2=1)
    state = state_of(hello(0, tmp_path), hello(1, tmp_path))
    lines = collector.collect(state).remedies.lines
    assert any("zero_optimization.stage" in line and "saves about" in line for line in lines)
    assert any("train_micro_batch_size_per_gpu" in line and "saves" not in line for line in lines)
    other = state_of(hello(0, tmp_path, config_digest="another"))  # it trained with a config of its own
    assert collector.collect(other).remedies.lines == ()
    collector.note(node(run_rss_bytes=2 * GIB))
    assert collector.collect(state).memory.held == "ranks held 6.00 GiB of 12.0 GiB"
    half = state_of(hello(0, tmp_path))
    assert collector.collect(half).memory.held == "the run held 2.00 GiB of 12.0 GiB"


def test_an_xid_counts_for_the_rank_on_that_gpu_and_for_a_minute(tmp_path: Path) -> None:
    collector = EvidenceCollector(launched(tmp_path), tmp_path, play(tmp_path / "root"))
    state = state_of(hello(0, tmp_path, device_uuid="GPU-a"), hello(1, tmp_path, device_uuid="GPU-b"))
    now = time.time()
    for xid in (Xid(31, 1, "GPU-b", now - 300), Xid(79, 1, "GPU-b", now - 2), Xid(45, 1, "GPU-b", now - 1)):
        collector.hear(xid)
    found = collector.collect(state).xids
    assert set(found) == {1} and found[1].startswith("GPU 1: XID 79: the GPU has fallen off the bus; reboot")


def test_a_small_shared_memory_is_told_at_the_start_where_gpus_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs(16384, 16000))
    root = play(tmp_path / "root")
    told = EvidenceCollector(launched(tmp_path, "cuda"), tmp_path, root).warning()
    assert "/dev/shm has only 64.0 MiB" in told and "--shm-size" in told
    assert EvidenceCollector(launched(tmp_path, "cpu"), tmp_path, root).warning() == ""


def test_offload_is_advised_against_where_it_is_what_fills_the_host(tmp_path: Path) -> None:
    root = play(tmp_path / "root", v2=0)
    offload = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    collector = EvidenceCollector(launched(tmp_path, "cuda", zero_optimization=offload), tmp_path, root)
    gpu = GpuStats(index=0, uuid="GPU-a", name="x", used_bytes=2 * GIB, total_bytes=80 * GIB)
    collector.note(node(gpus=[gpu]))
    play(root, v2=1)
    lines = collector.collect(state_of(hello(0, tmp_path), hello(1, tmp_path))).remedies.lines
    assert any("offload_optimizer.ratio" in line and "on each GPU" in line for line in lines)
    json.dumps(lines)
