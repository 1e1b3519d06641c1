"""A loop of accelerate's with its tracker. STAGE=N: with a DeepSpeedPlugin, ZeRO stage N, which under --as-deepspeed is
zerotop's engine."""

import os
import sys

import common
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

trackers = []
watcher = None
if common.WATCH:
    from zerotop.integrations import watch
    from zerotop.integrations.accelerate import ZerotopTracker

    trackers.append(ZerotopTracker())
plugin = None
if stage := os.environ.get("STAGE"):
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": common.BATCH,
            "gradient_accumulation_steps": common.MICRO_STEPS,
            "gradient_clipping": 0.0,  # else accelerate sets 1.0
            "zero_optimization": {"stage": int(stage)},
            "zero_allow_untested_optimizer": True,
        }
    )
accelerator = Accelerator(
    cpu=plugin is None,  # which would leave the plugin out
    gradient_accumulation_steps=common.MICRO_STEPS,
    deepspeed_plugin=plugin,
    log_with=trackers or None,
)
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
if plugin is not None:
    accelerator.save_state(f"{common.OUT}/state")
    print("DEEPSPEED", sys.modules["deepspeed"].__file__)
common.tell(losses)
accelerator.end_training()
