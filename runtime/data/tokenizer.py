"""Tokenizers: raw bytes, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.config.vocab import BYTE_TOKENS
from runtime.data import DataError

KEY = "zerotop.data.tokenizer"
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")


class Tokenizer(Protocol):
    """The interface of tokenizers. `eot`: the end-of-text token; `digest`: changes if the same text would give other
    tokens."""

    name: str
    vocab_size: int
    eot: int | None
    digest: str

    def encode(self, pieces: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        """(token ids of each piece as unsigned 1-D arrays, number of characters replaced because they were not
        UTF-8)."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; the end-of-text token is left out."""
        ...


class ByteTokenizer:
    """Tokens 0 to 255 are the bytes of the text, and 256 is the end of a document."""

    name = "bytes"
    vocab_size = BYTE_TOKENS
    eot: int | None = 256
    digest = "bytes-1"

    def encode(self, pieces: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces], 0

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json read with the `tokenizers` library. Text that is not UTF-8 is replaced and counted."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{KEY}: cannot read {file} ({error.strerror}); "
                'expected "bytes", a tokenizer.json file, or a folder with one'
            ) from None
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise DataError(
                f"{KEY}: {file} needs the tokenizers library (pip install tokenizers); "
                'without it, write "tokenizer": "bytes"'
            ) from None
        try:
            self._library = Library.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for anything it cannot read
            raise DataError(f"{KEY}: {file} is not a tokenizer.json: {error}") from None
        self._library.no_padding()
        self._library.no_truncation()
        self.name = str(path)
        self.vocab_size: int = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eot: int | None = self._find_eot(file.parent / "tokenizer_config.json")
        self.digest = f"hf-1-{hashlib.blake2b(content, digest_size=16).hexdigest()}-{self.eot}"

    def _find_eot(self, settings: Path) -> int | None:
        names = list(EOT_NAMES)
        if settings.is_file():
            try:
                named: Any = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError):
                raise DataError(f"{KEY}: {settings} is not a JSON object") from None
            names.insert(0, named.get("content", "") if isinstance(named, dict) else str(named))
        ids = (self._library.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def encode(self, pieces: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        texts, replaced = [], 0
        for piece in pieces:
            try:
                texts.append(piece.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append(piece.decode("utf-8", errors="replace"))
                replaced += texts[-1].count("\N{REPLACEMENT CHARACTER}")
        encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.uint32) for one in encoded], replaced

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode([int(token) for token in tokens if token != self.eot], skip_special_tokens=False)


def load_tokenizer(name: str, folder: Path | None = None) -> Tokenizer:
    """`"bytes"`, or the path of a tokenizer.json or of a folder with one (relative paths start at `folder`).

    Raises DataError for a path that is missing or unreadable, or when the tokenizers library is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    return HuggingFaceTokenizer((folder or Path.cwd()) / Path(name).expanduser())
