"""Trains a small transformer under DistributedDataParallel and writes to OUT, as JSON, what each step took rank 0:
[ms, ms of CPU time of all its threads]."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

STEPS, MICRO_STEPS, WIDTH, BLOCKS = int(os.environ["STEPS"]), 2, 256, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2048, WIDTH)
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(BLOCKS)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, 2048)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.blocks(self.embedding(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def main() -> None:
    """One run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if os.environ["WATCH"] == "1":
        from runtime.telemetry import watch

        watch(model, optimizer, accumulation=MICRO_STEPS, steps=STEPS)
    times = []
    for _ in range(STEPS):
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(MICRO_STEPS):
            (model(torch.randint(0, 2048, (4, 64))) / MICRO_STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - cpu_began)))
    if dist.get_rank() == 0:
        Path(os.environ["OUT"]).write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
