"""What `zerotop plan` says a rank holds is, category by category and to the byte, what the engine's ledger counts: of
states and of what the engine holds beside them at its most, on the training device and on the host."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import runtime.offload.placement
from runtime.checkpoint.content.capture import blocks_of
from runtime.checkpoint.saving.snapshot import Snapshot
from runtime.config import load
from runtime.config.presets import PRESETS, GPTConfig, unit_parameters
from runtime.engine.initialize import initialize
from runtime.host.pinned import page_rounded
from runtime.models.gpt import GPT
from runtime.offload.placement import FlatSize, _plan
from runtime.offload.streamed import ring_bytes
from runtime.plan import Layout, stage_layout
from runtime.plan.workload import Workload, workload_of
from runtime.zero.gradients import GradientConfig
from runtime.zero.stage import policy_for
from tests.harness.ranks import Ranks
from tests.numerics.remote import remote_device

SMALL = 500  # elements; norms are 36
STATES = ("parameters", "gradients", "masters", "optimizer")
LEDGERS = {name: name for name in STATES} | {"buffers": "communication", "staging": "communication"}
"""Category of the plan -> category of the ledger."""
ON_HOST = {"device": "cpu", "pin_memory": True}
OFFLOADS: list[dict[str, Any]] = [
    {},
    {"offload_optimizer": ON_HOST},
    {"offload_optimizer": {**ON_HOST, "ratio": 0.4}},
    {"offload_param": ON_HOST},
    {"offload_optimizer": ON_HOST, "offload_param": ON_HOST},
    {"offload_optimizer": {**ON_HOST, "ratio": 0.4}, "offload_param": ON_HOST},
]
UNITS = [None, ["blocks.*"], ["embedding", "blocks.0", "blocks.3.feed_in", "head"], ["blocks"]]
VOCABULARIES = [65, 600]  # a table smaller than a block, and one that is larger


@dataclasses.dataclass(frozen=True)
class Case:
    """`remote`: the host plays a device whose memory is another."""

    shape: GPTConfig
    config: dict[str, Any]
    remote: bool

    def plan(self, world_size: int) -> Layout:
        device = "cuda" if self.remote else "cpu"
        resolved = load(self.config).resolve(world_size, device)  # type: ignore[arg-type]
        units = unit_parameters(self.shape, resolved.persistence_threshold, resolved.zerotop.units)
        workload = dataclasses.replace(workload_of(resolved, "small", units, self.shape), stream_chunk_bytes=0)
        offload, parameters = resolved.offload_optimizer is not None, resolved.offload_param is not None
        return stage_layout(workload, resolved.stage, offload, parameters)


def cases(stage: int, remote: bool, rounds: int) -> Iterator[Case]:
    """Every way to offload and accumulate in every precision, so many times; the rest takes turns."""
    units_there_and_back = UNITS + UNITS[-2::-1]  # of odd lengths: no turn keeps step with the precisions
    vocabularies = [VOCABULARIES[index] for index in (0, 1, 1, 0, 1)]
    turns = [
        itertools.cycle(values)
        for values in (
            units_there_and_back,
            (False, True, True),
            vocabularies,
            (1, 2, 2),
            (None, None, "bf16"),
            ("fp32", "bf16"),
        )
    ]
    for offload, accumulate, precision in itertools.product(OFFLOADS, ("ranges", "local"), ("fp32", "bf16")):
        if stage < 3 and "offload_param" in offload:
            continue
        for _ in range(rounds):
            units, tied, vocabulary, micro_steps, travels, moments = (next(turn) for turn in turns)
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": micro_steps,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": SMALL, **offload},
                "bf16": {"enabled": precision == "bf16"},
                "zerotop": {
                    "telemetry": {"enabled": False},
                    "accumulate": accumulate,
                    "units": units,
                    "optimizer_state_dtype": moments,
                },
            }
            if travels is not None:
                config["communication_data_type"] = travels
            shape = GPTConfig(4, 2, 36, vocabulary, 16, tied)  # sizes that need padding
            yield Case(shape, config, remote)


@dataclasses.dataclass(frozen=True)
class Counted:
    peaks: dict[str, int]
    offloaded: dict[str, int]
    asked_bytes: int
    """What the host was asked for before anything was there."""
    snapshot_bytes: int


def train(several: list[Case]) -> list[Counted]:
    """Each for four steps."""
    return [_trained(case) for case in several]


def _trained(case: Case) -> Counted:
    asked: list[int] = []
    before = runtime.offload.placement.page_rounded
    runtime.offload.placement.page_rounded = lambda sizes: before(asked.extend(sizes) or asked)
    torch.manual_seed(0)
    try:
        if case.remote:
            with remote_device("prompt"):
                engine, *_ = initialize(model=GPT(case.shape), config=case.config)
        else:
            engine, *_ = initialize(model=GPT(case.shape), config=case.config)
    finally:
        runtime.offload.placement.page_rounded = before
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(case.shape.vocab_size, (1, 16), generator=generator)
    for _ in range(4 * case.config["gradient_accumulation_steps"]):
        engine.backward(engine(tokens, tokens))
        engine.step()
    engine.synchronize()
    ledger = engine.state.ledger
    return Counted(ledger.peaks(), ledger.offloaded(), sum(asked), Snapshot(blocks_of(engine.state)).nbytes)  # type: ignore[arg-type]


def differences(case: Case, counted: Counted, world_size: int) -> dict[str, Any]:
    """Whatever is not what the plan says: (the plan's figure, the rank's)."""
    layout = case.plan(world_size)
    found = {name: (layout.gpu[name], counted.peaks[LEDGERS[name]]) for name in (*STATES, "buffers")}
    host = {LEDGERS[name]: nbytes // world_size for name, nbytes in layout.host.items()}
    found |= {f"{name} on the host": (host.get(name, 0), nbytes) for name, nbytes in counted.offloaded.items()}
    asked = layout.host_bytes if layout.offload or layout.offload_parameters else 0
    found["asked of the host"] = asked, counted.asked_bytes * world_size
    found["snapshot"] = layout.snapshot_bytes, counted.snapshot_bytes * world_size
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("remote", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_category_of_the_plan_is_the_ledgers(
    ranks: Callable[[int], Ranks], world_size: int, stage: int, remote: bool, rounds: int
) -> None:
    several = list(cases(stage, remote, rounds))
    of_ranks = ranks(world_size).run(train, several)
    wrong = [
        (case.config, case.shape, found)
        for of_rank in of_ranks
        for case, counted in zip(several, of_rank, strict=True)
        if (found := differences(case, counted, world_size))
    ]
    assert not wrong, f"{len(wrong)} of {len(several) * world_size}, the first: {wrong[0]}"


# ---- before anything is taken ----------------------------------------------------------------------------------------
def placed(
    config: dict[str, Any],
    units: list[tuple[str, int]],
    world_size: int,
    remote: bool = True,
    frozen: tuple[tuple[str, int], ...] = (),
) -> Any:
    """What runtime/offload/placement.py decides for an engine on a GPU."""
    resolved = load(config).resolve(world_size, "cuda")
    precision = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
    sharded = resolved.stage == 3 and world_size > 1
    sizes = [FlatSize(numel, precision, trained=True, sharded=sharded and name != "small") for name, numel in units]
    whole = 0
    for name, numel in frozen:
        if sharded and name != "small":
            sizes.append(FlatSize(numel, precision, trained=False, sharded=True))
        else:
            whole += numel * precision.itemsize
    comm: Any = SimpleNamespace(world_size=world_size, device=torch.device("cuda"), gather_objects=lambda one: [one])
    policy = policy_for(resolved.stage, resolved.zerotop.accumulate == "local")
    return _plan(resolved, policy, comm, GradientConfig(torch.float32), sizes, remote, whole)


def test_a_7b_offload_pins_what_the_plan_says() -> None:
    """The blocks of a 7B model at one rank, in whole pages."""
    units = unit_parameters(PRESETS["gpt-7b"], SMALL)
    zero = {"stage": 2, "offload_optimizer": ON_HOST}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    blocks = placed(config, units, 1).blocks
    planned = stage_layout(Workload("7b", tuple(units), PRESETS["gpt-7b"], 1), 2, offload=True).host_bytes
    assert sum(blocks) == planned > 100 * 2**30
    assert page_rounded(blocks) - planned < mmap.PAGESIZE * len(blocks) < 2**20


@pytest.mark.parametrize("accumulate", ["ranges", "local"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("frozen", [(), (("small", 1 << 20), ("layers.0", 6 << 30))])
@pytest.mark.parametrize("free_gib", [20, 60, 200])
def test_a_reserve_of_vram_keeps_the_states_there_that_the_plan_says(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, frozen: tuple[tuple[str, int], ...], stage: int, accumulate: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free_gib * 2**30, 0))
    shape = PRESETS["gpt-7b"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "offload_optimizer": ON_HOST},
        "zerotop": {"offload": {"vram_reserve_gib": 2}, "accumulate": accumulate},
    }
    resolved = load(config).resolve(2, "cuda")
    units = unit_parameters(shape, resolved.persistence_threshold)
    workload = dataclasses.replace(
        workload_of(resolved, "7b", units, shape), free_vram_bytes=free_gib * 2**30, frozen=frozen
    )
    decided = placed(config, units, 2, frozen=frozen)
    on_host = sum(numel for numel, leaves in zip(decided.shard_numels, decided.on_host, strict=True) if leaves)
    layout = stage_layout(workload, stage, offload=True)
    assert layout.host["optimizer"] == 2 * 8 * on_host
    assert layout.host_bytes == 2 * sum(decided.blocks)
    assert (on_host > 0) == (free_gib < 200)
    if frozen and free_gib == 60:  # 12 GiB of frozen parameters on one rank leave less room to states, at every stage
        assert sum(decided.on_host) > sum(placed(config, units, 2).on_host)
    ring = ring_bytes(64 << 20, torch.float32, torch.float32)
    without = stage_layout(dataclasses.replace(workload, stream_chunk_bytes=0), stage, offload=True)
    assert layout.gpu["buffers"] - without.gpu["buffers"] in (0, ring)
