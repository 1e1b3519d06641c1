"""transformers' Trainer. OOM=STEP: once, after that step, the GPU's memory runs out, and the Trainer tries a smaller
batch. NAN=STEP: the loss of that step is NaN."""

import os
from typing import Any

import common
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

OOM, NAN = int(os.environ.get("OOM", "0")), int(os.environ.get("NAN", "0"))

set_seed(0)
config = LlamaConfig(
    vocab_size=common.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


class OutOfMemory(TrainerCallback):
    """Runs out of memory once."""

    raised = False

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_given: Any) -> None:
        if state.global_step == OOM and not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory.")


def poison(module: Any, arguments: Any, output: Any) -> None:
    """A forward hook."""
    if trainer.state.global_step + 1 == NAN and module.training:
        output.loss = output.loss * float("nan")


callbacks: list[TrainerCallback] = [OutOfMemory()]
if common.WATCH:
    from zerotop.integrations.transformers import ZerotopCallback

    callbacks.append(ZerotopCallback())
arguments = TrainingArguments(
    common.OUT,
    max_steps=common.STEPS,
    per_device_train_batch_size=common.BATCH,
    gradient_accumulation_steps=common.MICRO_STEPS,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    eval_strategy="steps",
    eval_steps=4,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    auto_find_batch_size=bool(OOM),
)
evaluated = [common.Samples()[index] for index in range(4)]
model = LlamaForCausalLM(config)
model.register_forward_hook(poison)
trainer = Trainer(
    model,
    arguments,
    train_dataset=common.Samples(),
    eval_dataset=evaluated,
    callbacks=callbacks,
)
trainer.train()
if trainer.is_world_process_zero():
    common.tell([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
