"""The files and hub data sets that zerotop.data.files names.

JSONL, JSON, CSV and text need no library, so that a broken line can be named; Parquet and zstd need pyarrow, and
the hub the `datasets` library.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runtime.config import ConfigError, expand_files
from runtime.config.finetune import HUB_DATA
from runtime.data import DataError
from runtime.data.conversations.formats import recognise
from runtime.process.extras import INSTALL_FINETUNING


@dataclass(frozen=True)
class Source:
    """A file or hub data set. `entry`: index in the config's list of files; `kind`: how it is read."""

    name: str
    entry: int
    kind: str  # "jsonl", "json", "parquet", "csv", "text", "hub"
    size: int
    """Bytes of the file; 0 if not known."""
    identity: str
    """Changes when the content does: path, size and modification time, or the hub's own fingerprint."""
    split: str = "train"
    key: str = "zerotop.data.files"
    streaming: bool = False
    """Whether a data set of the hub is read as it is downloaded."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.name)


def find_sources(
    entries: Sequence[str],
    folder: Path,
    split: str = "train",
    key: str = "zerotop.data.files",
    streaming: bool = False,
) -> list[Source]:
    """The sources that the entries of a list of files name; a file that several entries match counts with the first.

    Raises ConfigError for a glob that matches no file, DataError for what cannot be read.
    """
    found: list[Source] = []
    taken: set[Path] = set()
    for number, entry in enumerate(entries):
        if entry.startswith(HUB_DATA):
            name = entry.removeprefix(HUB_DATA).strip("/")
            found.append(Source(name, number, "hub", 0, f"{name}@{split}", split, key, streaming))
            continue
        try:
            files = expand_files([entry], folder)
        except ConfigError as error:
            problems = [problem.replace("zerotop.data.files[0]", f"{key}[{number}]", 1) for problem in error.problems]
            raise ConfigError(problems) from None
        for path in files:
            if path in taken:
                continue
            taken.add(path)
            try:
                stat = path.stat()
                kind = _kind(path)
            except OSError as error:
                raise DataError(f"{key}: cannot read {path}: {error.strerror or error}") from None
            identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
            found.append(Source(str(path), number, kind, stat.st_size, identity, key=key))
    return found


_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


def _kind(path: Path) -> str:
    """How a file is read: by its name, except that a .json file may hold lines."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1] if suffixes else "", "text")
    if kind == "json":
        with opened(path) as file:
            lines = list(itertools.islice((line for line in file if line.strip()), 2))
        rows = [row for line in lines if isinstance(row := _parsed(line), dict)]
        if lines and len(rows) == len(lines) and (len(rows) == 2 or recognisable(rows[0])):
            return "jsonl"
    return kind


def _parsed(line: bytes) -> Any:
    """A line of JSON; None if it is something else."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def opened(path: Path) -> BinaryIO:
    """The file, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        arrow = library("pyarrow", "files compressed with zstd")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def library(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"zerotop.data: {what} need the {name.partition('.')[0]} library: {INSTALL_FINETUNING}"
        ) from None


def source_digest(sources: Iterable[Source]) -> str:
    """Changes when the content of any source does."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        identity = source.identity
        if source.kind == "hub":
            identity += getattr(hub(source), "_fingerprint", "")
        digest.update(f"{source.entry}\0{source.kind}\0{identity}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


_hub_sets: dict[tuple[str, str, bool], Any] = {}


def hub(source: Source) -> Any:
    """A data set of the hub, or of a folder in its layout, loaded once."""
    key = (source.name, source.split, source.streaming)
    if (known := _hub_sets.get(key)) is not None:
        return known
    datasets = library("datasets", "data sets from the hub")
    try:
        loaded = datasets.load_dataset(source.name, split=source.split, streaming=source.streaming)
    except Exception as error:  # offline, no such data set, no such split, a script that fails: all in its words
        raise DataError(
            f'{source.key}: cannot load "{HUB_DATA}{source.name}" (split "{source.split}"): '
            f"{type(error).__name__}: {str(error).strip()[:500]}"
        ) from None
    _hub_sets[key] = loaded
    return loaded


def recognisable(row: Mapping[str, Any]) -> bool:
    """Whether a row has the columns of a format."""
    try:
        recognise(list(row))
    except DataError:
        return False
    return True
