"""Tiny Hugging Face models in folders, a tokenizer for them, and a trainer's wrapper around them. transformers is
imported when it is needed: it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.harness.huggingface import build

VOCABULARY = 96
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"


def save_model(kind: str, folder: Path | str, seed: int = 0) -> None:
    """Write a new model of a kind of tests/harness/huggingface.py, or "tied", to `folder`."""
    changes: dict[str, Any] = {"vocab_size": VOCABULARY}
    if kind == "gpt2":
        changes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if kind == "tied":
        kind, changes = "llama", changes | {"tie_word_embeddings": True}
    build(kind, seed, **changes).save_pretrained(folder)


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
