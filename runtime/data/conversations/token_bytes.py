"""Which token each byte of a text is in, from the tokens alone.

A tokenizer that is asked for the places of its tokens takes up to half as long again. Byte-level BPE (GPT-2's, and with
it that of Llama 3, Qwen, SmolLM) keeps every byte of a text, so there the lengths of the tokens say where they are.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

_KEEPS_BYTES = frozenset({"ByteLevel", "Split", "Digits"})
"""Pre-tokenizers that cut a text and change nothing in it."""


class TokenBytes:
    """The length in bytes of every token of a byte-level tokenizer."""

    def __init__(self, lengths: np.ndarray, composes: bool) -> None:
        """lengths: (vocabulary,) int64. composes: whether the tokenizer composes characters first (NFC)."""
        self._lengths, self._composes = lengths, composes

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes | None:
        """Of one of the tokenizers library; None if it does not keep every byte."""
        composes = type(tokenizer.normalizer).__name__ == "NFC"
        if type(tokenizer.model).__name__ != "BPE" or not (composes or tokenizer.normalizer is None):
            return None
        if not _keeps_bytes(tokenizer.pre_tokenizer):
            return None
        added = tokenizer.get_added_tokens_decoder()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        lengths = np.zeros(1 + max(vocabulary.values(), default=-1), np.int64)
        for token, number in vocabulary.items():
            # In the byte-level alphabet each character stands for one byte.
            lengths[number] = len(added[number].content.encode()) if number in added else len(token)
        return cls(lengths, composes)

    def indices(self, text: str, tokens: np.ndarray, places: Sequence[int]) -> list[int] | None:
        """For each place in `text` the index of the token that holds the character's first byte; the number of tokens
        for the place at its end. places: indices of characters, ascending. tokens: (count,) ids of the whole text.
        None if the tokens don't add up to the text, because the tokenizer left something out."""
        ends = np.cumsum(self._lengths[tokens])
        if text.isascii():
            size, wanted = len(text), places
        elif self._composes and not unicodedata.is_normalized("NFC", text):
            return None
        else:
            size, wanted = _in_bytes(text, places)
        if not len(ends) or ends[-1] != size:
            return None
        return np.searchsorted(ends, np.asarray(wanted, np.int64), side="right").tolist()


def _keeps_bytes(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        step["type"] in _KEEPS_BYTES and not step.get("add_prefix_space") and step.get("behavior") != "Removed"
        for step in steps
    )


def _in_bytes(text: str, places: Sequence[int]) -> tuple[int, list[int]]:
    """(length of the text, the places) in bytes of UTF-8."""
    size, before, found = 0, 0, []
    for place in places:
        size += len(text[before:place].encode())
        found.append(size)
        before = place
    return size + len(text[before:].encode()), found
