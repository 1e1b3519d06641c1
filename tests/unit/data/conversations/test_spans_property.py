"""Random conversations: tokens and masks agree with the formats as Python writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.data.conversations import spans
from tests.unit.data.conversations.templates import FORMATS, Format
from tests.unit.data.conversations.test_spans import encoded, encoder_of, reference

PIECES = st.sampled_from(
    [
        *("a", "word", " ", "\n", "\n\n", "\t", "é", "漢", "😀", "\U000f0000", "\U000f0001", "\U0010fffd"),
        *("<|im_start|>", "<|im_end|>", "assistant\n", "<|im_start|>assistant\n", "user\n"),
        *("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "<end_of_turn>\n<start_of_turn>model\n"),
        *("<|start|>assistant", "<|channel|>final<|message|>", "<|end|>", "<|return|>", "[/INST]", " [INST] ", "</s>"),
        *("<|assistant|>\n", "<|user|>", "<think>", "</think>", "<tool_response>", "</tool_response>", "<tool_call>"),
        *("None", "True", "{{ x }}", "{% if %}", '"', "\\"),
    ]
)
TEXT = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip() != "")
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def chat_of(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    said = [{"role": "system", "content": system}] if system is not None else []
    for ask, answer in turns:
        said += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return said


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_random_conversations(
    form: Format, make_tokenizer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the comparisons that are made every so often, so that those which a text calls for are tested."""
    monkeypatch.setattr(spans, "CHECKED_FIRST", 0)
    monkeypatch.setattr(spans, "CHECKED_EVERY", 1 << 40)
    tokenizer = make_tokenizer(form)
    encoder = encoder_of(tokenizer, tmp_path)

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(system=st.none() | TEXT, turns=TURNS)
    def agrees(system: str | None, turns: list[tuple[str, str]]) -> None:
        chat = chat_of(system if form.system else None, turns)
        ids, mask = reference(tokenizer, form, chat)
        assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
        assert encoded(encoder, chat) == (ids, mask)

    agrees()
