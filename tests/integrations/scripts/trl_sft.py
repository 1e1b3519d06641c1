"""TRL's SFTTrainer, with the callback of transformers."""

import common
import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
words = {f"w{number}": number for number in range(common.VOCABULARY - 2)} | {
    "<eos>": common.VOCABULARY - 2,
    "<unk>": common.VOCABULARY - 1,
}
core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=common.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
)
callbacks = []
if common.WATCH:
    from zerotop.integrations.transformers import ZerotopCallback

    callbacks.append(ZerotopCallback())
texts = [" ".join(f"w{(7 * row + column) % 60}" for column in range(12)) for row in range(256)]
arguments = SFTConfig(
    common.OUT,
    max_steps=common.STEPS,
    per_device_train_batch_size=common.BATCH,
    gradient_accumulation_steps=common.MICRO_STEPS,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model,
    args=arguments,
    train_dataset=datasets.Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    callbacks=callbacks,
)
trainer.train()
if trainer.is_world_process_zero():
    common.tell([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
