"""A rank that runs out of memory explains it: recognised errors, what held the memory, and that nothing is masked."""

from __future__ import annotations

import errno
import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runtime import __main__ as rank_main
from runtime.config import load
from runtime.config.presets import GPTConfig
from runtime.diagnose import outofmemory
from runtime.diagnose.memory_report import take_memory_report
from runtime.diagnose.outofmemory import FailedAllocation, explain, recognise, record_engine
from runtime.engine import Engine
from runtime.host.ledger import Ledger
from runtime.host.memory_limits import HostMemoryError
from runtime.host.pinned import Arena
from runtime.models.gpt import GPT
from runtime.models.origin import Origin
from runtime.plan.decoder import DecoderShape
from runtime.zero.cut import cut
from tests.harness.model_headers import llama

GIB = 2**30
CUDA_WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB of which 312.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.8 GiB memory in use."
)


def raised(act: Any) -> BaseException:
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def test_real_failures_of_allocators_are_recognised() -> None:
    torch_cpu = raised(lambda: torch.empty(1 << 50, dtype=torch.uint8))
    assert recognise(torch_cpu) == FailedAllocation("host", 1 << 50)
    assert recognise(raised(lambda: np.empty(1 << 50, np.uint8))) == FailedAllocation("host", 1 << 50)
    arena = recognise(raised(lambda: Arena(pin=False).zeros(1 << 50, torch.uint8)))
    assert arena == FailedAllocation("host", 1 << 50)
    assert recognise(raised(lambda: bytearray(1 << 60))) == FailedAllocation("host")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (torch.OutOfMemoryError(CUDA_WORDS), FailedAllocation("device", 2 * GIB, 1)),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), FailedAllocation("device", 512)),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be..."), FailedAllocation("device")),
        (RuntimeError("CUDA: out of memory (error 2)"), FailedAllocation("device")),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            FailedAllocation("device"),
        ),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), FailedAllocation("device")),
        (MemoryError("shared memory for collectives (1,000 bytes) has no 4,096 left"), FailedAllocation("host", 4096)),
        (HostMemoryError("offload needs 3 GiB"), FailedAllocation("host")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FailedAllocation("host")),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), FailedAllocation("host")),
        (
            RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)"),
            FailedAllocation("shared"),
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible..."),
            FailedAllocation("shared"),
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x"), FailedAllocation("shared")),
        (OSError(errno.ENOSPC, "No space left on device", "/home/me/x"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (ValueError("memory"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_recognised_by_words(error: BaseException, failure: FailedAllocation | None) -> None:
    assert recognise(error) == failure


def test_cudas_word_for_memory_that_it_cannot_page_lock_is_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA: out of memory (error 2)")

    monkeypatch.setattr("runtime.host.pinned.page_lock", refuse)
    error = raised(lambda: Arena(pin=True).zeros(1000, torch.float32))
    assert recognise(error) == FailedAllocation("host", 4000, what="pinned")


# ---- explained -------------------------------------------------------------------------------------------------------
@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outofmemory, "_engine_records", [])
    monkeypatch.setattr(outofmemory, "_kept", [])
    yield


def position(phase: str, step: int, micro_step: int) -> Any:
    now = SimpleNamespace(phase=phase, step=step, micro_step=micro_step)
    return SimpleNamespace(recorder=SimpleNamespace(position=lambda: now), step=lambda: step - 1)


def engine_of(device: str, **zero: Any) -> tuple[GPT, Ledger]:
    """What initialize() would have told: a small GPT with a ledger."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, **zero},
        "zerotop": {"data": {"seq_len": 64}},
    }
    resolved = load(config).resolve(4, device, script=True)  # type: ignore[arg-type]
    model, ledger = GPT(GPTConfig(4, 8, 1024, 50304, 64), "meta"), Ledger()
    where = torch.device("cuda", 1) if device == "cuda" else torch.device("cpu")
    record_engine(model, resolved, where, ledger, cut(model, None, 0))
    return model, ledger


def play_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU of 80 GiB with 0.3 free; returns what was asked of it."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 4, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
    return asked


def test_a_gpu_that_is_full(monkeypatch: pytest.MonkeyPatch, nothing_known: None) -> None:
    asked = play_gpu(monkeypatch)
    model, ledger = engine_of("cuda")
    ledger.add("optimizer", 20 * GIB)
    ledger.add("parameters", 10 * GIB)
    ledger.add("optimizer", 3 * GIB, offloaded=True)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(CUDA_WORDS)

    monkeypatch.setattr("torch.nn.functional.gelu", fail)
    error = raised(lambda: model(torch.zeros(1, 8, dtype=torch.long, device="meta")))
    found = explain(error, position("forward", 12, 3), keep=Engine)
    assert found is not None and asked == ["empty_cache"]
    lines = [line.strip() for line in found.lines]
    assert lines[0] == (
        "Out of memory: tried to allocate 2.00 GiB on cuda:1, 256 MiB free; forward of step 12, micro-step 3 of 4, "
        "in blocks.0"
    )
    at = lines.index("In use on cuda:1 (80.0 GiB):")
    assert lines[at + 1 : at + 6] == [
        "40.0 GiB  activations and temporary",
        "20.0 GiB  optimizer",
        "10.0 GiB  parameters",
        "5.00 GiB  cached by torch's allocator, in no tensor",
        "4.75 GiB  CUDA context, NCCL, and other processes on this GPU",
    ]
    assert "3.00 GiB  offloaded optimizer" in lines
    assert "What to change (the global batch of 64 is unchanged):" in lines
    assert any(line.startswith("1. ") and "saves about" in line and "per GPU" in line for line in lines)
    assert any("expandable_segments" in line for line in lines)  # 5 GiB are there, in pieces
    assert found.reason.startswith(
        "out of GPU memory: tried to allocate 2.00 GiB on cuda:1, 256 MiB free (forward of step 12"
    )
    assert '; try "' in found.reason and "\n" not in found.reason
    assert found.text.splitlines()[-1] == found.reason


def test_host_memory_on_a_cpu(nothing_known: None) -> None:
    _model, ledger = engine_of("cpu")
    ledger.add("gradients", 123 * 2**20)
    found = explain(
        MemoryError("shared memory for collectives (1,000 bytes) has no 4,096 left"),
        position("init", 0, 0),
        keep=Engine,
    )
    assert found is not None
    assert (
        found.lines[0].startswith("Out of memory: tried to allocate 4.00 KiB of host memory")
        and "initialize()" in found.lines[0]
    )
    assert any("123 MiB  gradients" in line for line in found.lines)
    assert any("activations and temporary, and the process itself" in line for line in found.lines)
    assert "offload" not in found.text  # host and device are one memory


def test_more_than_there_is_in_all_is_no_matter_of_settings(nothing_known: None) -> None:
    _model, _ledger = engine_of("cpu")
    found = explain(raised(lambda: torch.empty(1 << 50, dtype=torch.uint8)), None, keep=Engine)
    assert found is not None and "no setting helps" in found.reason
    assert not any(line.strip().startswith("1.") for line in found.lines)


def test_host_memory_beside_a_gpu_without_offload_points_at_the_script(
    monkeypatch: pytest.MonkeyPatch, nothing_known: None
) -> None:
    play_gpu(monkeypatch)
    _model, _ledger = engine_of("cuda")
    found = explain(MemoryError(), None, keep=Engine)
    assert found is not None and "num_workers" in found.text and "try" not in found.reason


def test_shared_memory_names_its_size(nothing_known: None) -> None:
    found = explain(
        RuntimeError("unable to write to file </torch_1_2_0>: No space left on device (28)"), None, keep=Engine
    )
    assert found is not None and "/dev/shm has" in found.reason and "num_workers" in found.reason


def test_the_failed_step_is_let_go_of_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, nothing_known: None
) -> None:
    class Activations:
        pass

    seen: list[weakref.ref[Activations]] = []

    def step() -> None:
        activations = Activations()
        seen.append(weakref.ref(activations))
        raise MemoryError

    written = outofmemory._compose
    at_writing: list[object] = []

    def note(*arguments: Any) -> Any:
        gc.collect()
        at_writing.append(seen[0]())
        return written(*arguments)

    monkeypatch.setattr(outofmemory, "_compose", note)
    error = raised(step)
    assert seen[0]() is not None
    assert explain(error, None, keep=Engine) is not None
    assert at_writing == [None]


def test_an_error_raised_from_one_about_memory_is_explained_and_others_are_not(nothing_known: None) -> None:
    def wrapped() -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("the loader broke") from error

    assert explain(raised(wrapped), None, keep=Engine) is not None
    assert explain(ValueError("no"), None, keep=Engine) is None


def test_a_failing_explanation_masks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_known: None
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("again")

    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(outofmemory, "take_memory_report", broken)
    monkeypatch.setattr(rank_main, "_goodbye", lambda *arguments, **more: said.append((*arguments, more)))
    code = rank_main._failed(raised(lambda: bytearray(1 << 60)))
    assert code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "MemoryError"
    outcome, text, *_, more = said[0]
    assert outcome == "failed" and text.splitlines()[-1] == "MemoryError" and not more.get("fatal")


def test_the_reason_is_the_last_line_of_the_goodbye_and_of_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_known: None
) -> None:
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(rank_main, "_goodbye", lambda *arguments, **more: said.append((*arguments, more)))
    assert rank_main._failed(raised(lambda: torch.empty(1 << 50, dtype=torch.uint8))) == 1
    log = capsys.readouterr().err.splitlines()
    assert log[0].startswith("Traceback") and any("DefaultCPUAllocator" in line for line in log)
    _, text, *_, more = said[0]
    assert more == {"fatal": True}
    last = text.splitlines()[-1]
    assert last.startswith("error: out of host memory: tried to allocate 1.00 PiB") and log[-1] == last
    assert "DefaultCPUAllocator" in text  # the traceback's end stands in front


def test_held_is_read_without_a_gpu() -> None:
    held = take_memory_report([], torch.device("cpu"))
    assert held.rss_bytes > 10 * 2**20 and held.activations_bytes == held.rss_bytes
    if sys.platform == "linux":
        assert held.free_host_bytes is not None and held.free_host_bytes < held.host_total_bytes


def test_the_plan_of_a_fine_tuned_model_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outofmemory, "_engine_records", [])
    folder = llama(tmp_path / "files", dim=32, layers=2, vocab_size=64)
    module = torch.nn.ModuleDict({"trained": torch.nn.Linear(4, 4), "frozen": torch.nn.Linear(4, 4)})
    module["frozen"].requires_grad_(False)
    module.origin = Origin("some/model", folder, on_hub=True)  # type: ignore[assignment]
    data = {"files": ["chats.jsonl"], "seq_len": 16}
    given = {"train_micro_batch_size_per_gpu": 1, "zerotop": {"model": {"path": "some/model"}, "data": data}}
    config, ledger, units = load(given).resolve(1, "cpu"), Ledger(), cut(module)
    record_engine(module, config, torch.device("cpu"), ledger, units)
    workload = outofmemory._engine_records[-1].workload
    assert isinstance(workload.shape, DecoderShape) and (workload.shape.layers, workload.shape.dim) == (2, 32)
    assert (workload.trained_parameters, workload.frozen_parameters) == (20, 20)  # of the module itself
    assert workload.chunked_loss
    (folder / "config.json").unlink()
    record_engine(module, config, torch.device("cpu"), ledger, units)
    workload = outofmemory._engine_records[-1].workload
    assert (workload.shape, workload.trained_parameters, workload.frozen_parameters) == (None, 20, 20)
