"""What our hooks cost the training thread, at the 124M preset.

    python -m benchmarks.hooks --markdown benchmarks/results/hooks.md

Two ranks, one thread each. Every hook that the engine puts on the model is timed. `in hooks` has everything in it:
Python, moving gradients into flat buffers, reading other ranks' ranges, waiting for them. `Python` is the same at a
width of 12: as many modules, parameters and collectives, and nothing to move. Both per micro-step of 124M.
"""

from __future__ import annotations

import argparse
import json
import os
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
from torch import nn

from benchmarks.context import ROOT, markdown, measured_on, table
from runtime.config.presets import PRESETS, GPTConfig
from runtime.models.gpt import GPT

PRESET = "gpt-124m"
STAGES = (0, 1, 2, 3)
NARROW = 12
WARM, TIMED = 4, 8
"""Micro-steps."""


class Timer:
    """Nanoseconds in all functions that it wrapped."""

    def __init__(self) -> None:
        self.ns = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return function(*arguments)
            finally:
                self.ns += time.perf_counter_ns() - began

        return timed

    def watch(self, owner: Any, name: str) -> None:
        """From now on hooks that `owner.name(self, hook, ...)` registers are timed."""
        register = getattr(owner, name)
        setattr(owner, name, lambda it, hook, **more: register(it, self.wrap(hook), **more))


def rank(stage: int, width: int, seq: int, out: Path) -> None:
    timer = Timer()
    for name in ("register_post_accumulate_grad_hook", "register_hook"):
        timer.watch(torch.Tensor, name)
    for name in ("register_forward_pre_hook", "register_forward_hook"):
        timer.watch(nn.Module, name)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import runtime

    full = PRESETS[PRESET]
    shape = GPTConfig(full.layers, full.heads if width == full.dim else 1, width, full.vocab_size // 8, seq)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    torch.manual_seed(0)
    engine = runtime.initialize(model=GPT(shape), config=config)[0]
    tokens = torch.randint(shape.vocab_size, (1, seq))
    hooks_ms, micro_ms = [], []
    for number in range(WARM + TIMED):
        timer.ns, began = 0, time.perf_counter_ns()
        engine.backward(engine(tokens, tokens))
        if number >= WARM:
            hooks_ms.append(timer.ns / 1e6)
            micro_ms.append((time.perf_counter_ns() - began) / 1e6)
        engine.step()
    if dist.get_rank() == 0:
        out.write_text(json.dumps([statistics.median(hooks_ms), statistics.median(micro_ms)]))
    dist.barrier()
    os._exit(0)


def measure(stage: int, width: int, seq: int) -> tuple[float, float]:
    """Milliseconds in hooks, and of the whole micro-step."""
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="zerotop-hooks-") as folder:
        probe.bind(("127.0.0.1", 0))
        port, out = probe.getsockname()[1], Path(folder) / "figures.json"
        probe.close()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        command += ["--master-port", str(port), "-m", "benchmarks.hooks", "--rank", str(stage), str(width), str(seq)]
        subprocess.run([*command, str(out)], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        hooks_ms, micro_ms = json.loads(out.read_text())
        return hooks_ms, micro_ms


def main() -> int:
    parser = argparse.ArgumentParser(prog="hooks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seq", type=int, default=256, help="tokens of a micro-step and rank")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, with what it ran on")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        stage, width, seq = (int(text) for text in options.rank[:3])
        rank(stage, width, seq, Path(options.rank[3]))
    rows = []
    for stage in STAGES:
        hooks_ms, micro_ms = measure(stage, PRESETS[PRESET].dim, options.seq)
        python_ms, _ = measure(stage, NARROW, options.seq)
        shares = f"{hooks_ms / micro_ms:.1%}", f"{python_ms / micro_ms:.2%}"
        rows.append([str(stage), f"{micro_ms:.0f}", f"{hooks_ms:.1f}", shares[0], f"{python_ms:.2f}", shares[1]])
        print(f"stage {stage}: {rows[-1]}", file=sys.stderr, flush=True)
    header = ["stage", "micro-step ms", "in hooks ms", "of it", "Python ms", "of the micro-step"]
    print(table(header, rows, pipes=False))
    if options.markdown:
        context = measured_on("benchmarks.hooks", ("torch",))
        body = table(header, rows, pipes=True)
        options.markdown.write_text(markdown(f"Hooks, {PRESET}, bf16, 2 ranks on the CPU", context, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
