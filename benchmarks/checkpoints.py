"""How long training stands still for a checkpoint, and what all of it costs: zerotop, DeepSpeed, torch's own.

    python -m benchmarks.checkpoints --markdown benchmarks/results/checkpoints.md

Two ranks, one thread each, the 25M GPT of benchmarks.peers in bf16. In one process cycles of 20 steps with a checkpoint
at their start and cycles without take turns: `lost` compares neighbours. Between them training waits, untimed, until a
checkpoint is on disk: none is written into a cycle without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.context import ROOT, markdown, measured_on, table

STAGE = 2
WARM_STEPS = 4
MODES = ("zerotop", "deepspeed", "dcp-async")

Parts = tuple[Callable[[int], None], Callable[[Path], None], Callable[[], None]]
"""One optimizer step; begin a checkpoint in a folder; wait until it is on disk."""


def _engine(model: Any, ga: int, zerotop: bool) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ga,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": STAGE},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "steps_per_print": 10**9,
    }
    if zerotop:
        import runtime

        return runtime.initialize(model=model, config=config)[0]
    import deepspeed

    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _with_engine(model: Any, batches: Any, ga: int, zerotop: bool) -> Parts:
    engine = _engine(model, ga, zerotop)

    def step(number: int) -> None:
        for micro in range(ga):
            engine.backward(engine(*batches(number, micro)))
            engine.step()

    if zerotop:
        return step, lambda folder: engine.save_checkpoint(folder, "c", wait=False), engine.wait_for_checkpoint
    return step, lambda folder: engine.save_checkpoint(str(folder), "c"), lambda: None


def _with_fsdp2(model: Any, batches: Any, ga: int) -> Parts:
    from torch.distributed.checkpoint import async_save
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    group = dist.new_group(backend="gloo")
    under_way: list[Any] = []

    def step(number: int) -> None:
        for micro in range(ga):
            (model(*batches(number, micro)) / ga).backward()
        optimizer.step()
        optimizer.zero_grad()

    def begin(folder: Path) -> None:
        parameters, states = get_state_dict(model, optimizer)
        saving = async_save({"model": parameters, "optimizer": states}, checkpoint_id=folder / "c", process_group=group)
        under_way.append(saving)

    def wait() -> None:
        while under_way:
            under_way.pop().result()

    return step, begin, wait


def rank(mode: str, steps: int, pairs: int, ga: int, folder: Path) -> None:
    from benchmarks.peers.workload import GPT, Batches, Size

    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo" if mode == "dcp-async" else "gloo")
    size = Size(8, 512, 8, 256, 2, ga)
    torch.manual_seed(0)
    model, batches = GPT(size), Batches(size, dist.get_rank())
    parts = (
        _with_fsdp2(model, batches, ga) if mode == "dcp-async" else _with_engine(model, batches, ga, mode == "zerotop")
    )
    step, begin, wait = parts
    number = 0

    def cycle(saves: bool) -> tuple[float, float]:
        """Seconds for which training stood still for the checkpoint, and of the whole cycle."""
        nonlocal number
        dist.barrier()
        began, blocked = time.perf_counter(), 0.0
        for index in range(steps):
            step(number)
            number += 1
            if index == 0 and saves:
                at = time.perf_counter()
                begin(folder / str(number))
                blocked = time.perf_counter() - at
        return blocked, time.perf_counter() - began

    for _ in range(WARM_STEPS):
        step(number)
        number += 1
    cycle(True)  # memory is taken, processes are started
    wait()
    found = []
    for pair in range(pairs):
        first = cycle(pair % 2 == 0)
        at = time.perf_counter()
        wait()
        waited = time.perf_counter() - at
        second = cycle(pair % 2 == 1)
        at = time.perf_counter()
        wait()
        waited += time.perf_counter() - at
        found.append((*(first if pair % 2 == 0 else second), (second if pair % 2 == 0 else first)[1], waited))
        if dist.get_rank() == 0:
            print(f"{mode}: {[round(value, 3) for value in found[-1]]}", file=sys.stderr, flush=True)
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "figures.json").write_text(json.dumps(found))
    dist.barrier()
    if mode == "zerotop":
        from runtime.checkpoint.checkpointer import leave_all

        leave_all()
    os._exit(0)


def measure(mode: str, steps: int, pairs: int, ga: int) -> list[list[float]]:
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="zerotop-checkpoints-") as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        command += ["--master-port", str(port), "-m", "benchmarks.checkpoints", "--rank", mode, str(steps), str(pairs)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([*command, str(ga), folder], cwd=ROOT, check=True, env=variables)
        figures: list[list[float]] = json.loads((Path(folder) / "figures.json").read_text())
        return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="checkpoints", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("modes", nargs="*", default=MODES, metavar="MODE", help=f"of {', '.join(MODES)}; default: all")
    parser.add_argument("--steps", type=int, default=20, help="of a cycle")
    parser.add_argument("--pairs", type=int, default=5, help="of cycles with and without a checkpoint")
    parser.add_argument("--ga", type=int, default=4, help="micro-steps of a step")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, with what it ran on")
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        mode, steps, pairs, ga, folder = options.rank
        rank(mode, int(steps), int(pairs), int(ga), Path(folder))
    rows = []
    for mode in options.modes:
        figures = measure(mode, options.steps, options.pairs, options.ga)
        blocked, saving, plain, waited = zip(*figures, strict=True)
        lost = [with_s / without_s - 1 for with_s, without_s in zip(saving, plain, strict=True)]
        rows.append(
            [
                mode,
                f"{1000 * statistics.median(blocked):.1f}",
                f"{1000 * max(blocked):.1f}",
                f"{statistics.median(plain) / options.steps * 1000:.0f}",
                f"{sum(saving) / sum(plain) - 1:+.2%}",
                f"{statistics.median(lost):+.2%}",
                f"{min(lost):+.2%} to {max(lost):+.2%}",
                f"{statistics.median(waited):.1f}",
            ]
        )
    header = ["mode", "blocked ms", "most", "step ms", "lost", "median of pairs", "range", "waited after the cycle, s"]
    print(table(header, rows, pipes=False))
    if options.markdown:
        context = measured_on("benchmarks.checkpoints", ("torch", "deepspeed"))
        body = table(header, rows, pipes=True)
        title = f"Checkpoints of the 25M GPT, bf16, stage {STAGE}, 2 ranks on the CPU, one in {options.steps} steps"
        options.markdown.write_text(markdown(title, context, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
