"""A tiny chat model in a folder: Llama of two layers, byte tokens, ChatML. And dialogues that it can learn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

POSITIONS = 256
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_chat_model(folder: Path, template: str | None = CHATML, **changes: Any) -> Path:
    """Write model, tokenizer and template to `folder`. `changes` are for the model's config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = chat_tokenizer(template)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": POSITIONS, "vocab_size": 320, "eos_token_id": 2,
        "bos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(sizes | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared_in(folder: Path, section: Any) -> Any:
    """`prepare` of the config's zerotop section, with its cache in `folder` and not in the user's."""
    from runtime.trainer.prepare import prepare

    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")}):
        return prepare(section, folder, lambda line: None)


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """Bytes and three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=words, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def write_dialogues(path: Path, count: int = 40) -> Path:
    """JSONL of messages, each with two answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"What is {number} + 1?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "You are welcome."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
