"""Two NCCL ranks on one GPU: every stage equals plain torch, collectives overlap with computing, and memory is what the
ledger says. Needs NCCL 2.30 (several ranks on one GPU are an experimental feature of it)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.harness import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.nccl.version() < (2, 30), reason="needs NCCL 2.30 or newer"
    ),
]

ONE_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2", "LOCAL_RANK": "0"}
END_S = 100

PARITY = """
import torch, torch.distributed as dist
from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch, train_plainly
engine = initialize(model=make("plain"), config=config({stage}, 2, clip=0.5))[0]
assert engine.comm.backend == "nccl" and engine.world_size == 2
for step in range(20):
    for micro in range(2):
        batch = [tensor.cuda() for tensor in micro_batch(step, micro, dist.get_rank(), 2)]
        engine.backward(engine(*batch))
        engine.step()
plain = train_plainly("plain", 2, 2, clip=0.5)
whole = engine.module.state_dict()
for name, value in plain.items():
    assert (whole[name].cpu() - value).abs().max().item() <= 1e-5, name
print("good")
"""

OVERLAP = """
import torch, torch.distributed as dist
from torch import nn
from runtime.engine.initialize import initialize
from runtime.comm.pending import DevicePending
model = nn.Sequential(); model.blocks = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(6))
def forward(x):
    for block in model.blocks:
        for _ in range(8):
            x = block(x).relu()
    return x.square().mean()
model.forward = forward
settings = {{"train_batch_size": 2, "zero_optimization": {{"stage": {stage}}}, "bf16": {{"enabled": True}},
            "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-4}}}}}}
engine = initialize(model=model, config=settings)[0]
spans = []
report = DevicePending.report
def keep(self):
    clock = self._clock
    spans.append((self._op, clock.ns(self._start), clock.ns(self._end), clock.ns(self._wait_begun)))
    report(self)
DevicePending.report = keep
x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
for step in range(4):
    spans.clear()
    engine.backward(engine(x)); engine.step()
torch.cuda.synchronize(); engine.comm._clock.report()
kind = "all_gather" if {stage} == 3 else "reduce_scatter"
ops = [span for span in spans if span[0] == kind]
hidden = sum(min(end, reached) - start for _, start, end, reached in ops if reached > start)
total = sum(end - start for _, start, end, _ in ops)
assert ops and hidden > total / 2, (hidden, total)
print("good")
"""

MEMORY = """
import torch
from runtime.engine.initialize import initialize
from runtime.models.gpt import GPT
from runtime.config.presets import GPTConfig
# cuBLAS's workspaces, of this thread and of autograd's, are torch's and not the ledger's.
first = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
first(torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
del first
base = torch.cuda.memory_allocated()
settings = {{"train_batch_size": 2, "zero_optimization": {{"stage": {stage}}}, "bf16": {{"enabled": True}},
            "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-4}}}}}}
model = GPT(GPTConfig(layers=8, heads=8, dim=1024, vocab_size=1024, max_seq_len=64))
engine = initialize(model=model, config=settings)[0]
tokens = torch.randint(1024, (1, 64), device="cuda")
for _ in range(3):
    engine.backward(engine(tokens, tokens)); engine.step()
torch.cuda.synchronize()
held, counted = torch.cuda.memory_allocated() - base, engine.state.ledger.total_bytes()
assert counted <= held <= counted * 1.05 + (8 << 20), (counted, held)
print("good")
"""


def run_two(program: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = ROOT
    shared = {**os.environ, **ONE_GPU, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=root, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outcomes = [rank.communicate(timeout=END_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (out, err) in zip(ranks, outcomes, strict=True):
        assert rank.returncode == 0 and "good" in out, err[-2000:]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parity(stage: int) -> None:
    run_two(PARITY.format(stage=stage))


@pytest.mark.parametrize("stage", [2, 3])
def test_collectives_run_while_the_gpu_computes(stage: int) -> None:
    run_two(OVERLAP.format(stage=stage))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ledger_is_what_torch_has_allocated(stage: int) -> None:
    run_two(MEMORY.format(stage=stage))
