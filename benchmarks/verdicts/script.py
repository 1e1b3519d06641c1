"""A training script that does one thing wrong on purpose. live.py launches it; so can you:

zerotop launch benchmarks/verdicts/config.json -- benchmarks/verdicts/script.py --fault slow --rank 1 --ms 100
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time

import torch
from torch import nn

import runtime as deepspeed

FAULTS = (
    "none",
    "slow",
    "loader",
    "all-loaders",
    "spin",
    "sleep",
    "order",
    "kill",
    "early",
    "cold-file",
    "cold-weights",
    "few-rows",
)
PAGES, PAGES_READ = 2**16, 500
"""Pages of the file that a rank with the fault `cold-file` or `cold-weights` has mapped, and those that it reads in a
micro-step: before it, or in its forward."""


class Net(nn.Module):
    """A stack of linear layers, of which each is a unit."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.backwards = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers) if self.backwards else self.layers:
            x = x + torch.tanh(layer(x))
        return x


def mapped_file() -> mmap.mmap:
    """A file of PAGES pages that nothing has in memory."""
    with tempfile.TemporaryFile() as file:
        for _ in range(PAGES):
            file.write(os.urandom(mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), PAGES * mmap.PAGESIZE, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--rank", type=int, default=1, help="the rank that misbehaves")
    parser.add_argument("--ms", type=float, default=100.0, help="how much slower a micro-step becomes")
    parser.add_argument("--at-step", type=int, default=20, help="the first step with the fault")
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    engine, *_ = deepspeed.initialize(model=(net := Net(options.width, options.layers)))
    mine = engine.global_rank == options.rank
    accumulation = engine.gradient_accumulation_steps()
    data = torch.randn(64, options.width)
    mapped = mapped_file() if options.fault.startswith("cold") and mine else None

    def read_pages() -> None:
        if mapped is not None:
            for page in random.sample(range(PAGES), PAGES_READ):
                mapped[page * mmap.PAGESIZE]

    def in_forward(*_given: object) -> None:
        if wrong == "slow":
            time.sleep(options.ms / 1000)
        elif wrong == "cold-weights":
            read_pages()

    wrong = "none"
    if mine:
        net.layers[0].register_forward_hook(in_forward)
    while engine.global_steps < options.steps:
        wrong = options.fault if engine.global_steps >= options.at_step else "none"
        for micro_step in range(accumulation):
            if (wrong == "loader" and mine) or wrong == "all-loaders":
                time.sleep(options.ms / 1000)
            if wrong == "cold-file":
                read_pages()
            if micro_step == 0 and mine:
                if wrong == "spin":
                    re.match(r"(a+)+$", "a" * 60 + "b")  # C code that never lets go of the GIL
                elif wrong == "sleep":
                    time.sleep(10**6)
                elif wrong == "order":
                    net.backwards = True
                elif wrong == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif wrong == "early":
                    sys.exit(0)
            loss = engine(data[:1] if wrong == "few-rows" else data).square().mean()
            engine.backward(loss)
            engine.step()


main()
