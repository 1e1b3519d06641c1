"""A small tokenizer, with the special tokens and the chat template that a test asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.packages import needs
from tests.unit.data.conversations.templates import Format

needs("transformers", "datasets")

_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "assistant user system model tool\n\nWhat is the weather in Paris? It is sunny.",
    '{"name": "weather", "arguments": {"city": "Paris"}}\n<think>\n\n</think>\n\n',
]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer of some hundred tokens, as text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        _TEXT * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return str(library.to_str())


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer_json: str) -> Callable[..., Any]:
    """Called with a Format, or with None for a base model's tokenizer without chat template."""

    def make(form: Format | None = None, template: str | None = None) -> Any:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        specials = list(form.specials) if form else ["<s>", "</s>"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json),
            bos_token=form.bos if form else "<s>",
            eos_token=form.eos if form else "</s>",
        )
        tokenizer.add_special_tokens({"additional_special_tokens": specials}, replace_extra_special_tokens=False)
        tokenizer.chat_template = template or (form.template if form else None)
        return tokenizer

    return make
