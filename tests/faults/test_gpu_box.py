"""Runs on a box of eight fake GPUs, from the driver's C interface to what the command line prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.messages import Event
from runtime.wire.node import GpuStats, NodeStats
from tests.harness import ROOT
from tests.harness.fake_cuda import FakeCuda
from tests.harness.fake_nvml import NO_PERMISSION, FakeNvml
from tests.harness.runs import StartedRun
from tests.harness.waiting import patient
from zerotop.hub.recorder import read_messages
from zerotop.launch import devices
from zerotop.source.live import LiveSource
from zerotop.state.gpu import concerns
from zerotop.state.memory import gpu_of

Start = Callable[..., StartedRun]


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("fake-cuda"))


def zerotop(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a process of its own that finds the fake libraries."""
    return subprocess.run(
        [sys.executable, "-m", "zerotop", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def doctor(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    answer = zerotop(environment, "doctor", "--json")
    return {finding["name"]: finding for finding in json.loads(answer.stdout)}


def events(source: LiveSource, what: str) -> list[str]:
    return [record.text for record in source.state.events if isinstance(record, Event) and record.what == what]


def facts_of(source: LiveSource, rank: int) -> GpuStats | None:
    return gpu_of(source.state, source.state.rank(rank))


def test_a_run_on_eight_gpus_shows_and_records_what_the_driver_says(start: Start, fake_nvml: FakeNvml) -> None:
    run = start(FAKE_GPU=1, FAKE_STEP_S=0.3, **fake_nvml.environment)
    run.see(lambda source: source.state.energy_use() is not None, "the energy of two steps")
    facts = facts_of(run.source, 1)
    assert facts is not None and facts.index == 1 and facts.power_w == 650 and facts.sm_clock_mhz == 1980

    def of_two_gpus(source: LiveSource) -> bool:  # two ranks, and not all eight; over the first steps it is rough
        use = source.state.energy_use()
        return use is not None and use.power_w == pytest.approx(2 * 650, rel=0.05)

    run.see(of_two_gpus, "the power of two GPUs")
    assert concerns(run.source.state) == {}

    fake_nvml.set(1, sm_clock=1200, reasons=0x4, ecc_uncorrected=1)
    fake_nvml.xid(5, 79)
    run.see(lambda source: 1 in concerns(source.state), "the throttled GPU")
    run.see(lambda source: len(events(source, "gpu")) >= 2, "its events", deadline_s=40)
    assert any("power cap" in text for text in events(run.source, "gpu"))
    assert any("GPU 5: XID 79" in text for text in events(run.source, "xid"))
    fake_nvml.set(1, lost=1)
    run.see(lambda source: (found := facts_of(source, 1)) is not None and found.lost, "the lost GPU")

    document = json.loads(zerotop(fake_nvml.environment, "status", run.entry.name, "--json").stdout)
    assert [len(node["gpus"]) for node in document["nodes"]] == [8]
    assert document["ranks"][0]["gpu"]["sm_activity_percent"] == 81
    assert document["ranks"][1]["gpu"]["lost"] and "reboot" in document["ranks"][1]["gpu_concerns"][0]
    assert document["energy"] is None  # one of the two counters is gone
    assert "GPU 1 (rank 1): the driver has lost it" in zerotop(fake_nvml.environment, "status", run.entry.name).stdout

    run.command("stop")
    run.see_end("stopped")
    recorded = [message for message in read_messages(run.path) if isinstance(message, NodeStats)]
    assert any(node.gpus and node.gpus[1].clock_reasons == ["power cap"] for node in recorded)
    assert any(node.gpus and node.gpus[0].links[1:2] == ["NV18"] for node in recorded)


def test_a_fatal_xid_is_the_verdict_on_the_run(start: Start, fake_nvml: FakeNvml) -> None:
    run = start(FAKE_GPU=1, FAKE_STEP_S=0.3, **fake_nvml.environment)
    run.see(lambda source: (found := facts_of(source, 1)) is not None and found.power_w, "the GPUs")
    fake_nvml.xid(1, 31)  # an error of a program
    run.see(lambda source: events(source, "xid"), "its event")
    fake_nvml.xid(1, 95)

    def at_fault(source: LiveSource) -> bool:
        return source.state.verdict is not None and source.state.verdict.what == "GPU fault"

    run.see(at_fault, "the verdict")
    verdict = run.source.state.verdict
    assert verdict is not None and verdict.ranks == [1]
    assert verdict.text.startswith("the GPU of rank 1: XID 95: GPU memory lost data of any program")


def test_a_driver_that_hangs_in_a_slow_call_stops_neither_the_probe_nor_the_run(
    start: Start, fake_nvml: FakeNvml
) -> None:
    run = start(FAKE_GPU=1, **fake_nvml.environment)
    run.see(
        lambda source: (found := facts_of(source, 0)) is not None and found.sm_activity_percent,
        "activity",
    )
    fake_nvml.hang("*", "nvmlDeviceGetFieldValues", patient(60))

    def sample(source: LiveSource) -> NodeStats | None:
        return next(iter(source.state.nodes.values()), None)

    def stale(source: LiveSource) -> bool:
        node = sample(source)
        return bool(node and node.gpus and "sm_activity_percent" in node.gpus[0].stale_fields)

    run.see(stale, "stale fields")
    times = set[int]()
    end = time.monotonic() + patient(4)
    while time.monotonic() < end:
        run.source.poll()
        node = sample(run.source)
        assert node is not None and node.gpus is not None and node.gpus[0].utilization_percent == 97
        times.add(node.at_ns)
        run.source.wait(0.05)
    assert len(times) >= 3
    run.command("stop")
    run.see_end("stopped")


def test_a_run_on_a_box_whose_driver_refuses_everything_goes_on(start: Start, fake_nvml: FakeNvml) -> None:
    for function in ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceRegisterEvents"):
        fake_nvml.fail("*", function, NO_PERMISSION)
    run = start(FAKE_GPU=1, FAKE_STEPS=60, **fake_nvml.environment)
    run.see_end("finished")
    recorded = [message for message in read_messages(run.path) if isinstance(message, NodeStats)]
    gpus = next(node.gpus for node in reversed(recorded) if node.gpus)
    assert {gpu.name for gpu in gpus} == {"no permission to access this GPU"}


def test_doctor_names_what_is_wrong_with_each_gpu(
    fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    fake_nvml.set(3, sm_clock=1200, reasons=0x4)
    fake_nvml.set(4, pcie_width=8)
    fake_nvml.set(6, lost=1)
    fake_nvml.fail("*", "nvmlDeviceGetTotalEccErrors", NO_PERMISSION)
    found = doctor(fake_nvml.environment)
    assert found["NVML"]["text"].startswith("driver 570.00 (fake), 7 × NVIDIA H200")
    assert {name for name in found if name.startswith("GPU ") and found[name]["level"] == "warn"} == {
        "GPU 3", "GPU 4", "GPU 6",
    }  # fmt: skip
    assert "SM 81%" in found["GPU 0"]["text"] and "650/700 W" in found["GPU 0"]["text"]
    assert "power cap" in found["GPU 3"]["fix"] and "8 of 16 lanes" in found["GPU 4"]["fix"]
    assert "reboot" in found["GPU 6"]["fix"]
    if not devices.torch_has_cuda():
        assert "built without CUDA" in found["torch on GPUs"]["text"]
    assert found["GPU figures"]["text"] == "no permission: ECC errors (GPU 0, 1, 2, 3, 4, 5, 7)"


def test_doctor_on_a_box_without_a_driver_and_on_one_whose_driver_hangs(
    fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    fake_nvml.no_driver()
    found = doctor(fake_nvml.environment)
    assert "no NVIDIA driver" in found["NVML"]["text"] and "GPU 0" not in found
    fake_nvml.reset()
    fake_nvml.hang(2, "nvmlDeviceGetName", patient(30))
    began = time.monotonic()
    found = doctor(fake_nvml.environment)
    assert "has not answered" in found["NVML"]["text"] and found["NVML"]["level"] == "warn"
    assert time.monotonic() - began < patient(25)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the loader's LD_LIBRARY_PATH is Linux's")
@pytest.mark.parametrize(
    ("start", "error", "fix"),
    [
        ({"version": 11040}, "error 35, CUDA driver version is insufficient", "update the NVIDIA driver"),
        ({"init": 802}, "error 802, system not yet initialized", "nvidia-fabricmanager"),
        ({"init": 803}, "error 803, system has unsupported display driver", "reboot"),
        ({"init": 101}, "error 101, invalid device ordinal", "nvidia-smi"),
    ],
)
def test_doctor_says_why_cuda_does_not_start(
    start: dict[str, int], error: str, fix: str, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = doctor(fake_cuda.environment(**start))["CUDA kernels"]
    if "not available" in found["text"]:
        pytest.skip("no CUDA kernels (no nvcc at install time)")
    assert found["level"] == "fail" and f"CUDA doesn't start: {error}" in found["text"] and fix in found["fix"]


def test_no_device_is_no_error(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert doctor(fake_cuda.environment(init=100))["CUDA kernels"]["level"] == "ok"


def test_launch_sees_the_gpus_and_says_that_torch_cannot_use_them(
    fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if devices.torch_has_cuda():
        pytest.skip("this torch is built for CUDA")
    config = tmp_path / "config.json"
    config.write_text("{}")
    answer = zerotop(fake_nvml.environment, "launch", str(config), "--device", "cuda", "--detach")
    assert answer.returncode == 2 and "built without CUDA" in answer.stderr
    assert not list(tmp_path.glob("zerotop/runs/*/run.json"))


def test_a_run_on_gpus_that_torch_cannot_use_ends_before_its_first_step_instead_of_training_on_the_cpu(
    launch_real: Callable[..., StartedRun], fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tutorial's config on a box with GPUs, up to the point where torch needs one."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    for name, value in fake_nvml.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(devices, "visible_gpus", lambda: (8, ""))
    config = json.loads((ROOT / "examples/zero2_offload.json").read_text())
    run = launch_real(config, device="auto", nproc=1)
    assert run.entry.run.device == "cuda"
    status = run.see_end("failed", deadline_s=patient(60))
    assert "this run is on GPUs, but torch" in status.reason and "(--device cpu)" in status.reason
    assert (status.step, status.attempt) == (0, 1)
