"""transformers' Trainer with its DeepSpeed integration, ZeRO stage STAGE. Under --as-deepspeed that is zerotop's
engine."""

import os
import sys

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
arguments = TrainingArguments(
    common.OUT,
    max_steps=common.STEPS,
    per_device_train_batch_size=common.BATCH,
    gradient_accumulation_steps=common.MICRO_STEPS,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=4,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    deepspeed={
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(os.environ.get("STAGE", "2"))},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
    },
)
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=common.Samples())
trainer.train(resume_from_checkpoint=os.environ.get("RESUME"))
if trainer.is_world_process_zero():
    print("DEEPSPEED", sys.modules["deepspeed"].__file__)
    common.tell([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
