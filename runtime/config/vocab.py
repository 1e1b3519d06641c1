"""Counts a tokenizer's tokens without numpy, torch or the tokenizers library, for `zerotop plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BYTE_TOKENS = 257
"""Size of the byte tokenizer's vocabulary: 256 bytes and the end of text."""


def count_tokens(name: str, folder: Path) -> int:
    """Tokens of `"bytes"`, of a tokenizer.json, or of a folder with one. Raises OSError or ValueError if unreadable."""
    if name == "bytes":
        return BYTE_TOKENS
    path = folder / Path(name).expanduser()
    with (path / "tokenizer.json" if path.is_dir() else path).open("rb") as file:
        document: Any = json.load(file)
    try:
        vocab = document["model"]["vocab"]
        highest: int = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        return int(1 + max([highest, *(added["id"] for added in document.get("added_tokens", ()))]))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a tokenizer.json") from None
