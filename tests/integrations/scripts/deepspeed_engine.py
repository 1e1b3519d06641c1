"""A loop of DeepSpeed's engine, ZeRO stage STAGE."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import common
import deepspeed
import torch

deepspeed.init_distributed("gloo")
model = common.Model()
config = {
    "train_micro_batch_size_per_gpu": common.BATCH,
    "gradient_accumulation_steps": common.MICRO_STEPS,
    "zero_optimization": {"stage": int(os.environ.get("STAGE", "2"))},
    "bf16": {"enabled": True},
}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
watcher = None
if common.WATCH:
    from runtime.telemetry import watch

    watcher = watch(engine)
losses = []
for step in range(common.STEPS):
    for micro_step in range(common.MICRO_STEPS):
        ids = common.batch(step, micro_step)
        loss = engine(ids, labels=ids)
        engine.backward(loss)
        engine.step()
    losses.append(loss.item())
    if watcher is not None and watcher.should_stop:
        break
common.tell(losses)
