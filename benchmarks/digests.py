"""Whether a change keeps every bit: losses and a digest of all parameters after 20 steps, for a grid of configurations
on two ranks of this machine.

    python -m benchmarks.digests --write before.json          on the old commit
    python -m benchmarks.digests --compare before.json        on the new one; exit code 1 where anything differs

Only public calls are used, so the same file runs on any commit. Digests of two machines may differ: kernels
and math libraries choose their instructions by the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

WORLD, STEPS, ACCUMULATION, BATCH, LENGTH, VOCABULARY, WIDTH, BLOCKS = 2, 20, 2, 2, 16, 61, 32, 3
OVERFLOW_STEPS = (3, 4)
"""fp16: in these steps one rank's loss is infinite, so that skipped steps are part of the comparison."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks, an embedding that is tied to the head, and one parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, config): stage x fp32/bf16 x optimizer offload x accumulation; some more in fp16, with SGD and with
    parameter offload."""
    grid = itertools.product(range(4), ("fp32", "bf16"), (False, True), ("", "local"))
    for stage, precision, offload, accumulate in grid:
        name = f"stage {stage}, {precision}{', offload' if offload else ''}{', accumulate local' if accumulate else ''}"
        yield name, _config(stage, precision, offload=offload, accumulate=accumulate)
    for stage in range(4):
        yield f"stage {stage}, fp16, skipped steps", _config(stage, "fp16", offload=stage == 1)
    yield "stage 2, bf16, SGD", _config(2, "bf16", optimizer={"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}})
    yield "stage 3, bf16, all offloaded", _config(3, "bf16", offload=True, offload_parameters=True)


def _config(
    stage: int,
    precision: str,
    offload: bool = False,
    accumulate: str = "",
    offload_parameters: bool = False,
    optimizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "optimizer": optimizer or {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-3}},
        "zerotop": {"telemetry": {"enabled": False}},
    }
    if precision == "fp16":
        config["fp16"] = {"initial_scale_power": 8, "hysteresis": 1}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    if accumulate:
        config["zerotop"]["accumulate"] = accumulate
    return config


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """This rank's losses, and what must be the same on every machine state: a digest of the parameters."""
    import runtime

    torch.manual_seed(0)
    model = Model()
    engine, *_ = runtime.initialize(model=model, model_parameters=model.parameters(), config=_resolved(config))
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    losses = []
    for step in range(STEPS):
        for _ in range(ACCUMULATION):
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
            loss = engine(tokens)
            overflows = "fp16" in config and step in OVERFLOW_STEPS and dist.get_rank() == 1
            engine.backward(loss * float("inf") if overflows else loss)
            engine.step()
            losses.append(float(loss.detach()))
    digest = hashlib.sha256()
    with runtime.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in sorted(model.named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().clone().view(torch.uint8).numpy().tobytes())
    found = {"losses": [loss.hex() for loss in losses], "parameters": digest.hexdigest(), "norm": _norm(engine)}
    engine.destroy()
    return found


def _resolved(config: dict[str, Any]) -> Any:
    """fp16 is refused on a CPU, where it is only slow: resolved as bf16 first."""
    from runtime.config import Fp16Config, load

    scaling = config.get("fp16")
    plain = {key: value for key, value in config.items() if key != "fp16"}
    resolved = load(plain | ({"bf16": {"enabled": True}} if scaling else {})).resolve(WORLD, "cpu", script=True)
    if scaling is None:
        return resolved
    return resolved.model_copy(update={"precision": "fp16", "fp16": Fp16Config(**scaling)})


def _norm(engine: Any) -> str:
    norm = engine.get_global_grad_norm()
    return "none" if norm is None else float(norm).hex()


def _rank(rank: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    found = {}
    for number, (name, config) in enumerate(names := list(configurations()), 1):
        if rank == 0:
            print(f"\r{number}/{len(names)} {name:50}", end="", file=sys.stderr, flush=True)
        found[name] = _train(config)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    """{configuration: [what rank 0 found, what rank 1 found]}"""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder,), WORLD)
        print(file=sys.stderr)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="figures of another commit on this machine")
    options = parser.parse_args()
    found = measure()
    if options.write:
        options.write.write_text(json.dumps(found, indent=1))
    if not options.compare:
        return 0
    before = json.loads(options.compare.read_text())
    different = [name for name in before if before[name] != found.get(name)]
    print(f"{len(before) - len(different)} of {len(before)} configurations are equal, bit for bit")
    for name in different:
        print(f"different: {name}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
