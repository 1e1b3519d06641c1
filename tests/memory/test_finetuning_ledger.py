"""What `zerotop plan` says of a Hugging Face model, with adapters or whole, is to the byte what the engine's ledger
counts when the trainer's wrapper trains it: of states and of what the engine holds beside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.checkpoint.content.capture import blocks_of
from runtime.checkpoint.saving.snapshot import Snapshot
from runtime.config import Resolved, load
from runtime.engine.initialize import initialize
from runtime.plan import Layout, stage_layout
from runtime.plan.pretrained import pretrained
from runtime.plan.workload import pretrained_workload
from runtime.zero.init import Init
from tests.harness import huggingface
from tests.harness.ranks import Ranks
from tests.memory.test_plan_ledger import LEDGERS, ON_HOST, STATES
from tests.numerics.remote import remote_device

LENGTH = 16
ADAPTERS: list[dict[str, Any] | None] = [
    None,
    {"r": 4},
    {"r": 24, "target_modules": ["q_proj", "o_proj"], "modules_to_save": ["embed_tokens"]},
]
BOTH_ON_HOST = {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}


@dataclasses.dataclass(frozen=True)
class Case:
    """`remote`: the host plays a device whose memory is another."""

    folder: str
    config: dict[str, Any]
    remote: bool

    def plan(self, world_size: int) -> Layout:
        resolved = self.resolved(world_size)
        workload = pretrained_workload(resolved, pretrained(resolved, Path()))
        workload = dataclasses.replace(workload, stream_chunk_bytes=0)
        offload, parameters = resolved.offload_optimizer is not None, resolved.offload_param is not None
        return stage_layout(workload, resolved.stage, offload, parameters)

    def resolved(self, world_size: int) -> Resolved:
        return load(self.config).resolve(world_size, "cuda" if self.remote else "cpu")


@functools.cache
def saved(kind: str) -> str:
    """A folder with the model, which lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="zerotop-model-")
    _folders.append(folder)
    return huggingface.save(kind, Path(folder.name), num_hidden_layers=3)


_folders: list[Any] = []


def cases(stage: int, thorough: bool) -> Iterator[Case]:
    """Every way to offload and to train, in each precision if `thorough`, else the precisions take turns."""
    folders = itertools.cycle([saved(kind) for kind in ("llama", "qwen3", "mixtral")])  # untied, tied, and untied
    offloads = [(False, {}), (True, {}), (True, BOTH_ON_HOST if stage == 3 else {"offload_optimizer": ON_HOST})]
    state_dtypes = itertools.cycle(("fp32", "bf16", "fp32", "fp32", "bf16"))
    turns = itertools.cycle(("fp32", "bf16"))
    every = itertools.product(offloads, ADAPTERS, ("fp32", "bf16") if thorough else (None,))
    for (remote, offload), lora, given in every:
        precision = given or next(turns)
        folder = next(folders)
        zerotop: dict[str, Any] = {
            "model": {"path": folder},
            "data": {"files": ["chats.jsonl"], "seq_len": LENGTH},
            "telemetry": {"enabled": False},
            "optimizer_state_dtype": next(state_dtypes),
            "lora": lora,
        }
        yield Case(
            folder,
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 500, **offload},
                "bf16": {"enabled": precision == "bf16"},
                "zerotop": {name: value for name, value in zerotop.items() if value is not None},
            },
            remote,
        )


def differences(several: list[Case]) -> list[dict[str, Any]]:
    """On a rank, for each case: whatever is not what the plan says, (the plan's figure, the rank's)."""
    return [_differences(case) for case in several]


def _differences(case: Case) -> dict[str, Any]:
    world = dist.get_world_size()
    layout, engine = case.plan(world), _trained(case)
    ledger = engine.state.ledger
    peaks, offloaded = ledger.peaks(), ledger.offloaded()
    found: dict[str, Any] = {
        name: (layout.gpu[name], peaks[LEDGERS[name]])  # type: ignore[index]
        for name in (*STATES, "buffers")
    }
    host = {LEDGERS.get(name, name): nbytes // world for name, nbytes in layout.host.items() if name != "activations"}
    found |= {f"{name} on the host": (host.get(name, 0), nbytes) for name, nbytes in offloaded.items()}
    blocks = blocks_of(engine.state, with_frozen=False)  # as the trainer's own checkpoints
    found["snapshot"] = layout.snapshot_bytes, Snapshot(blocks).nbytes * world
    engine.destroy()
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _trained(case: Case) -> Any:
    """An engine after three steps."""
    from runtime.models import huggingface as models
    from runtime.models.causal_lm import CausalLM

    config = case.resolved(dist.get_world_size()).zerotop
    with Init(weights=case.folder):
        model: Any = models.build(models.load_config(Path(case.folder), config.model), config.model)
        if config.lora is not None:
            from runtime.models.lora import add_adapters

            model = add_adapters(model, config.lora)
        wrapped = CausalLM(model, "chunked")
    if case.remote:
        with remote_device("prompt"):
            engine = initialize(model=wrapped, config=case.config)[0]
    else:
        engine = initialize(model=wrapped, config=case.config)[0]
    draw = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(1, huggingface.VOCABULARY, (1, LENGTH), generator=draw)
    positions = torch.cat([torch.arange(LENGTH // 2)] * 2)[None]
    for _ in range(6):
        engine.backward(engine(tokens, tokens.roll(-1, 1), positions))
        engine.step()
    engine.synchronize()
    return engine


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize(
    ("world_size", "thorough"),
    [(2, False), pytest.param(1, True, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_every_category_of_the_plan_is_the_ledgers(
    ranks: Callable[[int], Ranks], world_size: int, thorough: bool, stage: int
) -> None:
    several = list(cases(stage, thorough))
    of_ranks = ranks(world_size).run(differences, several)
    wrong = [
        (case.config, case.remote, found)
        for of_rank in of_ranks
        for case, found in zip(several, of_rank, strict=True)
        if found
    ]
    assert not wrong, f"{len(wrong)} of {len(several) * world_size}, the first: {wrong[0]}"
