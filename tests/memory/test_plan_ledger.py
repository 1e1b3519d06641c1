"""What `zerotop plan` says a rank's states take is, to the byte, what the engine's ledger counts; what it holds
meanwhile is never more than two units, and the root."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import runtime.placing
from runtime.api import initialize
from runtime.checkpoint.parts import blocks_of
from runtime.checkpoint.snapshot import Snapshot
from runtime.config import load
from runtime.models.gpt import GPT
from runtime.models.presets import PRESETS, GPTConfig, unit_parameters
from runtime.pinned import page_rounded
from runtime.placing import Size, _plan
from runtime.plan import Workload, stage_layout
from runtime.zero.gradients import GradientNumbers
from runtime.zero.stage import policy_for
from tests.numerics.remote import remote_device
from tests.ranks import Ranks

SMALL = 500  # elements; norms are 36


def ledger_after_two_steps(shape: GPTConfig, stage: int, precision: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes by category now, and the most there were; and what a checkpoint's copy takes."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": SMALL},
        "bf16": {"enabled": precision == "bf16"},
        "zerotop": {"telemetry": {"enabled": False}},
    }
    torch.manual_seed(0)
    engine, *_ = initialize(model=GPT(shape), config=config)
    tokens = torch.randint(shape.vocab_size, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(4):
        engine.backward(engine(tokens, tokens))
        engine.step()
    return engine.ledger.totals(), engine.ledger.peaks(), Snapshot(blocks_of(engine)).nbytes


OFFLOADED = {"gradients": "gradients", "masters": "masters", "optimizer": "optimizer", "parameters": "parameters"}
OFFLOADED["staging"] = "communication"


def offloaded_after_two_steps(
    shape: GPTConfig, stage: int, precision: str, ratio: float, parameters: bool
) -> tuple[dict[str, int], dict[str, int], list[int], int]:
    """Bytes by category on a device that the host plays, on the host, and the blocks that were asked for; and what a
    checkpoint takes."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": SMALL}
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True, "ratio": ratio}  # type: ignore[assignment]
    if parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}  # type: ignore[assignment]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
    }
    asked: list[int] = []
    before = runtime.placing.page_rounded
    runtime.placing.page_rounded = lambda sizes: before(asked.extend(sizes) or asked)
    try:
        with remote_device("prompt"):
            engine, *_ = initialize(model=GPT(shape), config=config)
    finally:
        runtime.placing.page_rounded = before
    tokens = torch.randint(shape.vocab_size, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(4):
        engine.backward(engine(tokens, tokens))
        engine.step()
    engine.synchronize()
    return engine.ledger.totals(), engine.ledger.offloaded(), asked, Snapshot(blocks_of(engine)).nbytes


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_plan_equals_ledger_with_offload(
    ranks: Callable[[int], Ranks], world_size: int, stage: int, precision: str, ratio: float
) -> None:
    shape = GPTConfig(layers=4, heads=2, dim=36, vocab_size=65, max_seq_len=16)
    for parameters in (False, True) if stage == 3 else (False,):
        work = Workload(
            "small", tuple(unit_parameters(shape, SMALL)), shape, world_size, precision=precision,
            offload_ratio=ratio, offload_parameters=parameters,
        )  # fmt: skip
        planned = stage_layout(work, stage, offload=True)
        run = ranks(world_size).run(offloaded_after_two_steps, shape, stage, precision, ratio, parameters)
        for ledger, offloaded, asked, snapshot in run:
            counted = {name: ledger[name] for name in ("parameters", "gradients", "masters", "optimizer")}
            assert counted == {name: planned.gpu[name] for name in counted}
            assert offloaded == {
                **dict.fromkeys(offloaded, 0),
                **{ours: planned.host[theirs] // world_size for theirs, ours in OFFLOADED.items()},
            }
            assert sum(asked) * world_size == planned.host_bytes  # what the host was asked for before it began
            assert snapshot * world_size == planned.snapshot_bytes


def test_a_7b_offload_pins_what_the_plan_says() -> None:
    """Before any memory is taken: the blocks of a 7B model at one rank, in whole pages."""
    shape = PRESETS["gpt-7b"]
    units = unit_parameters(shape, SMALL)
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    config = load({"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}).resolve(
        1, "cuda"
    )
    sizes = [Size(numel, torch.bfloat16, trained=True, sharded=False) for _, numel in units]
    comm: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    blocks = _plan(config, policy_for(2, False), comm, GradientNumbers(torch.float32), sizes, remote=True).blocks
    planned = stage_layout(Workload("7b", tuple(units), shape, 1), 2, offload=True).host_bytes
    assert sum(blocks) == planned > 100 * 2**30
    assert page_rounded(blocks) - planned < mmap.PAGESIZE * len(blocks) < 2**20


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_plan_equals_ledger(
    ranks: Callable[[int], Ranks], world_size: int, stage: int, precision: str, tied: bool
) -> None:
    shape = GPTConfig(layers=4, heads=2, dim=36, vocab_size=65, max_seq_len=16, tied=tied)  # sizes that need padding
    work = Workload("small", tuple(unit_parameters(shape, SMALL)), shape, world_size, precision=precision)
    assert work.padded_parameters > work.parameters
    planned, copied = stage_layout(work, stage).gpu, stage_layout(work, stage).snapshot_bytes
    for ledger, peaks, snapshot in ranks(world_size).run(ledger_after_two_steps, shape, stage, precision):
        counted = {name: ledger[name] for name in ("parameters", "gradients", "masters", "optimizer")}
        assert counted == {name: planned[name] for name in counted}
        if stage < 3 or world_size == 1:
            assert ledger["communication"] == planned["buffers"]
        assert peaks["communication"] == planned["buffers"]
        assert {name: peaks[name] for name in counted} == counted
        assert snapshot * world_size == copied
