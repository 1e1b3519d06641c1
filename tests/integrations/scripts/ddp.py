"""A loop of plain torch under DistributedDataParallel. NO_SYNC=1: it reduces in the last micro-step only."""

import contextlib
import os

import common
import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(common.Model())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
watcher = None
if common.WATCH:
    from runtime.telemetry import watch

    def save() -> str:
        path = f"{common.OUT}/model.pt"
        if dist.get_rank() == 0:
            torch.save(model.state_dict(), path)
        return path

    watcher = watch(model, optimizer, accumulation=common.MICRO_STEPS, steps=common.STEPS, save=save)
losses = []
for step in range(common.STEPS):
    for micro_step in range(common.MICRO_STEPS):
        ids = common.batch(step, micro_step)
        accumulates = "NO_SYNC" in os.environ and micro_step < common.MICRO_STEPS - 1
        with model.no_sync() if accumulates else contextlib.nullcontext():
            loss = model(ids, labels=ids)
            (loss / common.MICRO_STEPS).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if watcher is not None and watcher.should_stop:
        break
common.tell(losses)
dist.destroy_process_group()
