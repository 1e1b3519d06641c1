"""The engine on one GPU over NCCL equals plain torch on the same GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.harness import ROOT
from tests.harness.waiting import patient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROGRAM = """
import torch
from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.training import HYPER, STEPS, config, micro_batch

stage = {stage}
engine, _, _, _ = initialize(model=make("plain"), config=config(stage, 2, clip=0.5, precision={precision!r}))
assert engine.device.type == "cuda" and engine.comm.backend == "nccl"
plain = make("plain").cuda()
update = torch.optim.AdamW(plain.parameters(), **HYPER)
for step in range(STEPS):
    theirs = 0.0
    ours = 0.0
    for micro in range(2):
        tokens, targets = (t.cuda() for t in micro_batch(step, micro, 0, 1))
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        ours += loss.item() / 2
        with torch.autocast("cuda", torch.bfloat16, enabled={precision!r} == "bf16"):
            loss = plain(tokens, targets)
        (loss / 2).backward()
        theirs += loss.item() / 2
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    update.step()
    update.zero_grad()
    assert abs(ours - theirs) <= {tolerance}, (step, ours, theirs)
if {precision!r} == "fp32":
    for (name, a), b in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max().item() <= 1e-5, name
assert engine.state.ledger.totals()["optimizer"] == 8 * sum(flat.state_numel for flat in engine.state.flats)
assert torch.cuda.memory_allocated() >= engine.state.ledger.total_bytes()
print("equal")
"""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_equals_plain_torch(stage: int, precision: str, tolerance: float) -> None:
    program = PROGRAM.format(stage=stage, precision=precision, tolerance=tolerance)
    root = ROOT
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=patient(110)
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]


NO_WAIT = """
import torch
from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch

precision, scheduler = {precision!r}, {{"type": "WarmupLR", "params": {{"warmup_num_steps": 5}}}}
settings = config({stage}, 2, clip=0.5, precision=precision, scheduler=scheduler)
engine = initialize(model=make("plain"), config=settings)[0]
for step in range(8):
    for micro in range(2):
        tokens, targets = (t.cuda() for t in micro_batch(step, micro, 0, 1))
        loss = engine(tokens, targets)
        engine.backward(loss * float("inf") if step == 5 else loss)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        engine.step()
        torch.cuda.set_sync_debug_mode("default")
assert engine.skipped_steps >= 1 and engine.optimizer_steps + engine.skipped_steps == 8
print("no wait")
"""


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_does_not_wait_for_the_gpu(stage: int, precision: str) -> None:
    program = NO_WAIT.format(stage=stage, precision=precision)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patient(110)
    )
    assert done.returncode == 0 and "no wait" in done.stdout, done.stderr
