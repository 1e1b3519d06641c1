"""Where tokens are by their lengths, against what the tokenizer itself says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from runtime.data.conversations.token_bytes import TokenBytes

SPECIAL = "<|end|>"
TEXTS = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from([SPECIAL, "the quick ", "  \n", "über", "日本", "🙂", "e\u0301"])),
    min_size=1,
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def library(tokenizer_json: str) -> Any:
    made = Tokenizer.from_str(tokenizer_json)
    made.add_special_tokens([SPECIAL])
    return made


def indices(library: Any, text: str, places: list[int]) -> list[int] | None:
    known = TokenBytes.of(library)
    assert known is not None
    ids = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return known.indices(text, np.array(ids, np.uint16), places)


@given(text=TEXTS)
def test_every_character_is_in_the_token_that_the_tokenizer_says(library, text):
    encoding = library.encode(text, add_special_tokens=False)
    found = indices(library, text, list(range(len(text) + 1)))
    if not text:
        assert found is None  # no token says anything
        return
    assert found is not None
    assert found[-1] == len(encoding)
    # A character of several bytes may be in several tokens: the library names one of them, we its first byte's.
    for place, token in enumerate(found[:-1]):
        assert place == encoding.token_to_chars(token)[0] or token == encoding.char_to_token(place)
        assert token <= encoding.char_to_token(place)


@pytest.mark.parametrize("given_as", ["composed", "decomposed"])
def test_a_tokenizer_that_composes_characters(library, given_as):
    other = Tokenizer.from_str(library.to_str())
    other.normalizer = normalizers.NFC()
    text = "caf\u00e9 au lait" if given_as == "composed" else "cafe\u0301 au lait"
    assert (indices(other, text, [0]) is None) == (given_as == "decomposed")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True)])},
    ],
    ids=["lowercase", "strip", "prefix-space", "metaspace", "whitespace-left-out", "not-byte-level"],
)
def test_tokenizers_that_change_the_text_are_asked_themselves(library, change):
    other = Tokenizer.from_str(library.to_str())
    for name, value in change.items():
        setattr(other, name, value)
    assert TokenBytes.of(other) is None


def test_a_special_token_that_swallows_spaces_is_noticed(library):
    other = Tokenizer.from_str(library.to_str())
    other.add_special_tokens([AddedToken("<|tool|>", lstrip=True)])
    assert indices(other, "now <|tool|>", [0]) is None
    assert indices(other, "now<|tool|>", [0, 3]) == [0, len(other.encode("now"))]
