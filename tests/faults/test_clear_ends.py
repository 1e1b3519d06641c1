"""Real ranks that die of memory, of a crash and of a peer: what the user reads afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.wire.messages import Goodbye, RunStatus
from tests.harness.runs import StartedRun
from zerotop.documents import status_document, status_text
from zerotop.hub.recorder import read_messages
from zerotop.rundir.directory import read_entry

pytestmark = pytest.mark.timeout(240)
DEADLINE_S = 90.0

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {"checkpoint": {"interval": 0}},
}

SCRIPT = """
import ctypes, os, resource, sys, torch
import runtime as deepspeed

class Blocks(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

WIDTH = 64

def break_forward(*_):
    if engine.global_steps == 2 and engine.comm.rank == BAD:
        fail()

def break_initialize():
    pass

def fail():
    pass

BAD = 0
BREAKING
net = Blocks(WIDTH)
break_initialize()
engine, *_ = deepspeed.initialize(model=net)
net.blocks[2].register_forward_pre_hook(break_forward)
while True:
    loss = engine(torch.randn(4, WIDTH)).square().mean()
    engine.backward(loss)
    engine.step()
"""

ONE_TEBIBYTE = """
def break_forward(module, inputs):
    if engine.global_steps == 2 and engine.comm.rank == BAD:
        module.register_buffer("big", torch.empty(1 << 40, dtype=torch.uint8))
"""
IN_THE_FORWARD = """
WIDTH = 512
class Block(torch.nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if engine.global_steps == 2:
            # Room for this rank's own threads, not for this tensor.
            taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20), -1))
            torch.empty(1 << 30, dtype=torch.uint8)
        return y
torch.nn.Linear = Block
"""
IN_INITIALIZE = """
WIDTH = 4096  # 256 MiB of parameters, and three times that to come
def break_initialize():
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (192 << 20), -1))
"""
SEGV = """
BAD = 1
def fail():
    read_nothing()

def read_nothing():
    ctypes.string_at(0)
"""
PEER = """
BAD = 1
def fail():
    raise KeyError("the batch that broke it")
"""


@pytest.fixture
def launch(launch_real: Callable[..., StartedRun], tmp_path: Path) -> Callable[..., tuple[StartedRun, RunStatus]]:
    """`launch(BREAKING, nproc)`: the script with this in it, and how it ended."""

    def begin(breaking: str, nproc: int = 2, restarts: int = 1) -> tuple[StartedRun, RunStatus]:
        script = tmp_path / "mine.py"
        script.write_text(SCRIPT.replace("BREAKING", breaking))
        run = launch_real(CONFIG, nproc=nproc, script=[str(script)], overrides=[f"zerotop.restarts.limit={restarts}"])
        return run, run.see_end("failed", DEADLINE_S)

    return begin


def goodbyes(run: StartedRun) -> dict[int, Goodbye]:
    return {m.rank: m for m in read_messages(run.path) if isinstance(m, Goodbye)}


def shown(run: StartedRun) -> str:
    """What `zerotop status` prints."""
    return status_text(status_document(run.source.state, read_entry(run.path)))


def test_a_tensor_of_a_tebibyte(launch):
    run, status = launch(ONE_TEBIBYTE)
    assert status.reason.startswith(
        "rank 0 failed after step 2: out of host memory: tried to allocate 1.00 TiB of host memory"
    )
    assert "forward of step 3, micro-step 1 of 2" in status.reason
    assert "no setting helps" in status.reason
    assert (status.failed_rank, status.exit_code, status.restarts) == (0, 1, 0)  # another attempt ends the same way
    assert goodbyes(run)[0].fatal
    lines = status.error.splitlines()
    assert any(line.startswith("RuntimeError: ") and "DefaultCPUAllocator" in line for line in lines)
    at = next(number for number, line in enumerate(lines) if line.startswith("In use by this rank (RSS "))
    assert any(line.endswith("  parameters") for line in lines[at:])
    log = (run.path / "logs" / "1" / "rank-0.log").read_text()
    assert "In use by this rank" in log and log.index("Traceback") < log.index("In use by this rank")
    assert "(exit 1)" in shown(run) and "In use by this rank" in shown(run)


def test_a_limit_that_a_forward_reaches(launch):
    run, status = launch(IN_THE_FORWARD, nproc=1)
    assert "out of host memory: tried to allocate 1.00 GiB of host memory" in status.reason
    assert "in blocks.0)" in status.reason  # the module that asked
    assert '; try "train_micro_batch_size_per_gpu": 4 -> 2, "gradient_accumulation_steps": 2 -> 4' in status.reason
    assert "(ulimit -v)" in status.error
    assert goodbyes(run)[0].fatal


def test_a_model_that_initialize_has_no_room_for(launch):
    _, status = launch(IN_INITIALIZE, nproc=1)
    assert status.reason.startswith("rank 0 failed before its first step: out of host memory")
    assert "initialize()" in status.reason
    assert "Traceback" in status.error or "Error" in status.error
    assert "In use by this rank" in status.error


def test_a_crash_in_native_code_leaves_the_python_stack(launch):
    _, status = launch(SEGV, restarts=0)
    assert status.reason.startswith("rank 1 was killed by SIGSEGV (segmentation fault in native code")
    assert (status.failed_rank, status.exit_code) == (1, -signal.SIGSEGV)
    lines = status.error.splitlines()
    assert lines[0] == "Fatal Python error: Segmentation fault"
    assert lines[1].startswith("Current thread ") and any("in read_nothing" in line for line in lines)


def test_a_rank_that_lost_its_peer_hides_nothing(launch):
    _, status = launch(PEER, restarts=0)
    assert status.reason.startswith("rank 1 failed after step 2: KeyError: 'the batch that broke it'")
    assert status.failed_rank == 1 and "KeyError" in status.error
