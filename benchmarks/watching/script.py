"""Trains a small transformer under DistributedDataParallel and writes to OUT, as JSON, what each step took rank 0:
[ms, ms of CPU time of all its threads, of these those of telemetry's threads, and those of the training thread in what
watch() has it call]."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class Calls:
    """Times the methods of Watcher that hooks call."""

    METHODS = (
        *("forward_begins", "forward_ended", "backward_begins", "gradients_computed", "backward_ended"),
        *("step_begins", "step_ended"),
    )

    def __init__(self) -> None:
        self.ms = 0.0

    def time(self, watcher: type) -> None:
        """Time those of `watcher` from now on."""
        for name in self.METHODS:
            setattr(watcher, name, self._timed(getattr(watcher, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*given: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*given)
            finally:
                self.ms += 1e3 * (time.thread_time() - began)

        return timed


def telemetry_threads_ms() -> float:
    """CPU time so far of the threads of telemetry, and of ZeroMQ's own."""
    tasks = Path("/proc/self/task")
    ours = {str(thread.native_id) for thread in threading.enumerate() if thread.name.startswith("zerotop-")}
    ours |= {task.name for task in tasks.iterdir() if read(task / "comm").startswith("ZMQbg")}
    return sum(int((read(tasks / one / "schedstat") or "0").split()[0]) for one in ours) / 1e6


def read(path: Path) -> str:
    """The text of a thread's file; empty if the thread has ended."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def main() -> None:
    """One run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls = Calls()
    if os.environ["WATCH"] == "1":
        from runtime.telemetry import watch
        from runtime.telemetry.watching.watcher import Watcher

        calls.time(Watcher)
        watch(model, optimizer, accumulation=MICRO_STEPS, steps=STEPS)
    times = []

    def clocks() -> tuple[float, float, float, float]:
        return 1e3 * time.perf_counter(), 1e3 * time.process_time(), telemetry_threads_ms(), calls.ms

    for _ in range(STEPS):
        began = clocks()
        for _ in range(MICRO_STEPS):
            (model(torch.randint(0, 2048, (4, 64))) / MICRO_STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append([now - then for now, then in zip(clocks(), began, strict=True)])
    if dist.get_rank() == 0:
        Path(os.environ["OUT"]).write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
