"""transformers' Trainer."""

import common
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
config = LlamaConfig(
    vocab_size=common.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
callbacks = []
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
)
evaluated = [common.Samples()[index] for index in range(4)]
trainer = Trainer(
    LlamaForCausalLM(config),
    arguments,
    train_dataset=common.Samples(),
    eval_dataset=evaluated,
    callbacks=callbacks,
)
trainer.train()
if trainer.is_world_process_zero():
    common.tell([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
