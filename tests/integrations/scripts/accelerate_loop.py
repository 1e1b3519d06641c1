"""A loop of accelerate's with its tracker."""

import common
import torch
from accelerate import Accelerator

trackers = []
watcher = None
if common.WATCH:
    from zerotop.integrations import watch
    from zerotop.integrations.accelerate import ZerotopTracker

    trackers.append(ZerotopTracker())
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=common.MICRO_STEPS, log_with=trackers or None)
model = common.Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.init_trackers("test")
if common.WATCH:

    def save() -> str:
        accelerator.save_state(f"{common.OUT}/state")
        return f"{common.OUT}/state"

    watcher = watch(model, optimizer, accumulation=common.MICRO_STEPS, steps=common.STEPS, save=save)
losses = []
for step in range(common.STEPS):
    for micro_step in range(common.MICRO_STEPS):
        with accelerator.accumulate(model):
            ids = common.batch(step, micro_step)
            loss = model(ids, labels=ids)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.log({"train_loss": loss.item() / 2}, step=step)
    losses.append(loss.item())
    if watcher is not None and watcher.should_stop:
        break
common.tell(losses)
accelerator.end_training()
