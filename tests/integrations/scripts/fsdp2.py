"""A loop of plain torch under FSDP2 (fully_shard)."""

import common
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = common.Model()
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
watcher = None
if common.WATCH:
    from runtime.telemetry import watch

    def save() -> str:
        torch.save({name: p.to_local() for name, p in model.state_dict().items()}, f"{common.OUT}/{common.RANK}.pt")
        return f"{common.OUT}/{common.RANK}.pt"

    watcher = watch(model, optimizer, accumulation=common.MICRO_STEPS, steps=common.STEPS, save=save)
losses = []
for step in range(common.STEPS):
    for micro_step in range(common.MICRO_STEPS):
        ids = common.batch(step, micro_step)
        loss = model(ids, labels=ids)
        (loss / common.MICRO_STEPS).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if watcher is not None and watcher.should_stop:
        break
common.tell(losses)
dist.destroy_process_group()
