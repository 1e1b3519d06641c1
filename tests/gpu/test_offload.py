"""Offload on a GPU: the bits of a run without it, whoever updates, with shapes that expose missing waits; a step that
does not wait for the GPU; exact page-locked bytes; the GPU's memory given back in a pause."""

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

COMMON = """
import torch
from runtime.engine.initialize import initialize
from runtime.models.gpt import GPT
from runtime.config.presets import GPTConfig

SHAPE = GPTConfig(layers={layers}, heads=4, dim={dim}, vocab_size=1024, max_seq_len=64)

def start(stage, precision="bf16", offload=None, param=False, **section):
    zero = {{"stage": stage, "stage3_param_persistence_threshold": 0}}
    if offload is not None:
        zero["offload_optimizer"] = {{"device": "cpu", "pin_memory": True, **offload}}
    if param:
        zero["offload_param"] = {{"device": "cpu", "pin_memory": True}}
    config = {{
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        precision: {{"enabled": True}}, "zero_optimization": zero, "zerotop": {{"offload": section}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "eps": 1e-5}}}},
    }}
    if precision == "fp32":
        del config["fp32"]
    torch.manual_seed(0)
    return initialize(model=GPT(SHAPE), config=config)[0]

def batch(number):
    rows = torch.randint(1024, (4, 65), generator=torch.Generator().manual_seed(number)).cuda()
    return rows[:, :-1], rows[:, 1:]

def train(engine, steps=8, after=lambda engine, step: None):
    losses = []
    for step in range(steps):
        for micro in range(2):
            loss = engine(*batch(2 * step + micro))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        after(engine, step)
    return losses, {{name: value.clone().cpu() for name, value in engine.module.state_dict().items()}}

def same(ours, theirs):
    assert ours[0] == theirs[0], (ours[0], theirs[0])
    for name, value in theirs[1].items():
        assert torch.equal(ours[1][name], value), name
"""

BITS = """
resident = train(start({stage}, {precision!r}))
modes = [dict(update="cpu"), dict(update="gpu"), dict(update="auto"), dict(update="cpu", overlap=False),
         dict(update="gpu", overlap=False, chunk_mib=0.5)]
for section in modes:
    same(train(start({stage}, {precision!r}, offload={{}}, **section)), resident)
for ratio in (0.0, 0.5):
    same(train(start({stage}, {precision!r}, offload={{"ratio": ratio}}, update="cpu")), resident)
same(train(start({stage}, {precision!r}, offload={{"pin_memory": False}})), resident)
if {stage} == 3:
    for update in ("cpu", "gpu"):
        same(train(start(3, {precision!r}, offload={{}}, param=True, update=update)), resident)
    same(train(start(3, {precision!r}, param=True)), resident)
print("good")
"""

RELEASE = """
def give_back(engine, step):
    if step in (3, 5):
        before = torch.cuda.memory_allocated()
        freed = engine.memory.release()
        left = torch.cuda.memory_allocated()
        assert freed > 0 and left <= before - freed and left < before / 10 + (32 << 20), (before, freed, left)
        engine.memory.restore()

for offload in (None, {{}}):
    same(train(start({stage}, offload=offload), after=give_back), train(start({stage}, offload=offload)))
print("good")
"""

NO_WAIT = """
engine = start({stage}, {precision!r}, offload={{"ratio": {ratio}}}, param={param}, update={update!r})
checked = 0
for step in range(24):
    for micro in range(2):
        loss = engine(*batch(2 * step + micro))
        engine.backward(loss * float("inf") if step == 20 else loss)
        ahead = micro == 1 and engine.state.updates.will_overlap
        if ahead:
            torch.cuda._sleep(300_000_000)
        busy = torch.cuda.Event()
        busy.record()
        torch.cuda.set_sync_debug_mode("error" if ahead else "default")
        engine.step()
        torch.cuda.set_sync_debug_mode("default")
        assert not ahead or not busy.query(), "step() waited for the GPU"
        checked += ahead
assert checked >= 8 and engine.skipped_steps >= 1 and engine.optimizer_steps + engine.skipped_steps == 24
print("good")
"""

PINNED = """
engine = start(2, offload={}, update="cpu")
train(engine, steps=2)
requested, real = engine.state.ledger.pinned()
offloaded = sum(engine.state.ledger.offloaded().values())
assert requested == offloaded > 0, (requested, offloaded)
assert offloaded <= real < offloaded + 4096 * 8 * len(engine.state.flats) + 8 * 4096, (offloaded, real)
assert all(rule.exp_avg.is_pinned() and rule.flat.masters.is_pinned() for rule in engine.state.shard_optimizers)
print("good")
"""


def run(program: str, layers: int = 3, dim: int = 64) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", COMMON.format(layers=layers, dim=dim) + program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(110),
    )
    assert done.returncode == 0 and "good" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(("layers", "dim"), [(3, 64), (12, 32), (2, 1024)])  # many tiny units; units beyond a chunk
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_whoever_updates(stage: int, precision: str, layers: int, dim: int) -> None:
    run(BITS.format(stage=stage, precision=precision), layers, dim)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("update", ["cpu", "gpu", "auto"])
@pytest.mark.parametrize(
    ("stage", "param", "ratio"), [(0, False, 1.0), (2, False, 1.0), (2, False, 0.5), (3, True, 1.0)]
)
def test_a_step_does_not_wait_for_the_gpu(stage: int, param: bool, ratio: float, update: str, precision: str) -> None:
    run(NO_WAIT.format(stage=stage, precision=precision, ratio=ratio, param=param, update=update))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_is_given_back_in_a_pause(stage: int) -> None:
    run(RELEASE.format(stage=stage))


def test_page_locked_bytes_are_what_was_asked_for() -> None:
    run(PINNED)
