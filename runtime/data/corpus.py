"""Which files a run trains on: the config's globs, or the Python standard library's own source."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Sequence
from pathlib import Path

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
            f"{KEY}: no text given, and the default text is not there (no *.py under {root}); "
            'name files, for example ["data/**/*.txt"]'
        )
    return files


def find_files(patterns: Sequence[str], folder: Path) -> list[Path]:
    """Files that match the globs (`**` crosses folders, `~` is home), sorted within each glob, none twice.

    Relative globs start at `folder`. Raises DataError naming the first glob that matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = [folder / match for match in glob.glob(expanded, root_dir=folder, recursive=True)]
        matched = sorted(path for path in matches if path.is_file())
        if not matched:
            what = "only folders" if matches else "no file"
            raise DataError(f"{KEY}: {pattern!r} matches {what} in {folder}; globs start there, and ** crosses folders")
        files.update(dict.fromkeys(matched))
    return list(files)


def load_text(
    patterns: Sequence[str] | None, tokenizer: str, seq_len: int, folder: Path, log: Log
) -> tuple[Tokenizer, TokenDataset]:
    """Tokenizer and windows for a `zerotop.data` section; without `patterns` the default text.

    Relative paths start at `folder`. `log` gets progress lines. Raises DataError, naming the key, for what is
    unusable.
    """
    loaded = load_tokenizer(tokenizer, folder)
    files = find_files(patterns, folder) if patterns else default_files()
    return loaded, TokenDataset(token_file(files, loaded, log), seq_len)
