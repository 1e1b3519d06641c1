"""The loop of accelerate_loop.py with a DeepSpeedPlugin, ZeRO stage STAGE. Under --as-deepspeed that is zerotop's
engine."""

import os
import sys

import common
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

plugin = DeepSpeedPlugin(
    hf_ds_config={
        "train_micro_batch_size_per_gpu": common.BATCH,
        "gradient_accumulation_steps": common.MICRO_STEPS,
        "gradient_clipping": 0.0,  # else accelerate sets 1.0
        "zero_optimization": {"stage": int(os.environ.get("STAGE", "2"))},
        "zero_allow_untested_optimizer": True,
    }
)
accelerator = Accelerator(gradient_accumulation_steps=common.MICRO_STEPS, deepspeed_plugin=plugin)
model = common.Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
losses = []
for step in range(common.STEPS):
    for micro_step in range(common.MICRO_STEPS):
        with accelerator.accumulate(model):
            ids = common.batch(step, micro_step)
            loss = model(ids, labels=ids)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    losses.append(loss.item())
accelerator.save_state(f"{common.OUT}/state")
print("DEEPSPEED", sys.modules["deepspeed"].__file__)
common.tell(losses)
accelerator.end_training()
