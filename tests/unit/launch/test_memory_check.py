"""What launch says of memory before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runtime.config import Resolved, load
from runtime.host.memory_limits import Limits
from tests.harness.fake_nvml import FakeNvml
from zerotop.launch import memory_check
from zerotop.launch.memory_check import free_gpu_bytes, memory_warnings
from zerotop.launch.start import start_run
from zerotop.output import CommandError

GIB = 1 << 30


def resolved(device: str, offload: bool = False, world: int = 2, **section: Any) -> Resolved:
    zero: dict[str, Any] = {"stage": 2}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zerotop": {"model": {"preset": "gpt-7b"}, "data": {"seq_len": 128}, "train": {"steps": 1}, **section},
    }
    return load(config).resolve(world, device)  # type: ignore[arg-type]


def host(free: float, group: float = math.inf) -> Limits:
    return Limits(free, 0, group, group, math.inf)


def test_gpus_and_hosts_that_have_too_little_are_named() -> None:
    gpus, ram = memory_warnings(resolved("cuda", offload=True), Path(), host(8 * GIB), [6 * GIB, 4 * GIB])
    assert gpus.startswith("the plan needs ") and "GPU 1 has 4.00 GiB free, and 1 other GPU has too little, too" in gpus
    assert "of host RAM, and 8.00 GiB are free" in ram and "zerotop plan" in ram


def test_enough_is_nothing_to_speak_of() -> None:
    assert memory_warnings(resolved("cuda", offload=True), Path(), host(500 * GIB), [80 * GIB] * 2) == []
    assert memory_warnings(resolved("cuda", offload=True), Path(), host(500 * GIB), []) == []  # nothing is known
    # A third GPU with little left is none of the run's.
    assert memory_warnings(resolved("cuda", offload=True), Path(), host(500 * GIB), [80 * GIB] * 2 + [0]) == []


def test_on_the_cpu_all_is_in_host_memory_and_the_control_group_counts() -> None:
    (text,) = memory_warnings(resolved("cpu"), Path(), host(64 * GIB))
    assert "GiB of host RAM, and 64.0 GiB are free" in text
    (text,) = memory_warnings(resolved("cpu"), Path(), host(900 * GIB, 32 * GIB))
    assert "and 32.0 GiB are free" in text
    assert memory_warnings(resolved("cpu"), Path(), host(900 * GIB)) == []


@pytest.mark.parametrize(("given", "free"), [(None, [50, 90, 50]), ("1,0", [90, 50]), ("7,0", []), ("", [])])
def test_what_the_gpus_have_left_in_the_order_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, free: list[int]
) -> None:
    library = FakeNvml(tmp_path)
    library.gpus(3)
    library.set("*", total=100e9, used=50e9)
    library.set(1, used=10e9)
    monkeypatch.setenv("FAKE_NVML", str(library.control))
    monkeypatch.setattr(memory_check, "pynvml", library.binding())
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [size // 10**9 for size in free_gpu_bytes()] == free


def test_launch_writes_it_down_as_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("zerotop.launch.start.memory_warnings", lambda *_given: ["too little"])
    seen: list[Any] = []

    def stop(path: Path, *_given: Any, **_named: Any) -> None:
        seen.append((path / "logs" / "1" / "notes.json").read_text())
        raise CommandError("far enough")

    monkeypatch.setattr("zerotop.launch.start.start_supervisor", stop)
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zerotop": {"model": {"preset": "gpt-tiny"}, "data": {"seq_len": 16, "files": ["text.txt"]}},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(CommandError):
        start_run(path, nproc=1, device="cpu", name="q")
    assert '"what": "memory"' in seen[0] and '"severity": "warning"' in seen[0]
