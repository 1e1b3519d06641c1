"""Tiny Hugging Face models in folders, a tokenizer for them, and a trainer's wrapper around them. transformers is
imported when it is needed: it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"


def config_of(kind: str) -> Any:
    """The transformers config of a model with two layers."""
    import transformers as hf

    match kind:
        case "llama":
            return hf.LlamaConfig(**_COMMON, **_HEADS)
        case "tied":
            return hf.LlamaConfig(**_COMMON, **_HEADS, tie_word_embeddings=True)
        case "qwen3":
            return hf.Qwen3Config(**_COMMON, **_HEADS, head_dim=8)
        case "gemma3":  # tied
            return hf.Gemma3TextConfig(**_COMMON, **_HEADS, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
        case "gpt2":
            return hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_NO_DROPOUT)
        case "mixtral":
            return hf.MixtralConfig(**_COMMON, **_HEADS, num_local_experts=4)
        case "qwen3-moe":
            return hf.Qwen3MoeConfig(
                **_COMMON, **_HEADS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            )
    raise ValueError(kind)


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def save_model(kind: str, folder: Path | str, seed: int = 0) -> None:
    """Write a new model of this kind to `folder`, with weights large enough to matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)


def save_tokenizer(folder: Path | str) -> None:
    """Write a tokenizer with a chat template to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()[: VOCABULARY - 3]
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *sorted(letters)])}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)


class Trained(nn.Module):
    """A Hugging Face model as `.model`, as the trainer wraps it; its output is the mean cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model, tokens)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batch(step: int, sample: int) -> torch.Tensor:
    """[1, 12] tokens."""
    generator = torch.Generator().manual_seed(1000 * step + sample)
    return torch.randint(VOCABULARY, (1, 12), generator=generator)
