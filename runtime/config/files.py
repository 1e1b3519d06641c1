"""Expands the globs of zerotop.data.files, for the command line before a run starts and for the trainer."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError

KEY = "zerotop.data.files"


def expand_files(patterns: Sequence[str], folder: str | Path = ".") -> list[Path]:
    """The files that `zerotop.data.files` names, sorted and each once; relative globs start in `folder`.

    `**` crosses folders, `~` is the home folder. Raises ConfigError for every glob that matches no file.
    """
    start = Path(folder).resolve()
    files: set[Path] = set()
    problems = []
    for number, pattern in enumerate(patterns):
        matches = [
            start / match for match in glob.glob(str(Path(pattern).expanduser()), root_dir=start, recursive=True)
        ]
        found = [path.resolve() for path in matches if path.is_file()]
        if not found:
            what = "only folders" if matches else "no file"
            problems.append(
                f'{KEY}[{number}]: "{pattern}" matches {what} in {start}; globs start there, and ** crosses folders'
            )
        files.update(found)
    if problems:
        raise ConfigError(problems)
    return sorted(files)
