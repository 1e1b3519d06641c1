"""The text that a run trains on: the files of zerotop.data.files, or the source of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from runtime.config import expand_files
from runtime.data import DataError
from runtime.data.tokenizer import Tokenizer, load_tokenizer
from runtime.data.tokens import Log, TokenDataset, token_file

KEY = "zerotop.data.files"
_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def default_files() -> list[Path]:
    """The standard library's *.py files without its tests, sorted by path: text that every Python has on disk."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if not _NOT_SOURCE.intersection(path.relative_to(root).parts[:-1]))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise DataError(
            f"{KEY}: no files given, and the default text is missing (no *.py under {root}); "
            'name files, for example ["data/**/*.txt"]'
        )
    return files


def load_text(
    patterns: Sequence[str] | None, tokenizer: str, seq_len: int, folder: Path, log: Log
) -> tuple[Tokenizer, TokenDataset]:
    """The tokenizer and data set of a `zerotop.data` section; without `patterns` of the default text.

    Relative paths start at `folder`. `log` gets progress lines. Raises ConfigError for a glob that matches
    nothing, and DataError, naming the key, for anything else that cannot be used.
    """
    loaded = load_tokenizer(tokenizer, folder)
    files = expand_files(patterns, folder) if patterns else default_files()
    return loaded, TokenDataset(token_file(files, loaded, log), seq_len)
