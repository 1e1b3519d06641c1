"""Token files: text is tokenized once into a cached file, which every rank memory-maps.

A token file is a 4096-byte header (a magic line, then JSON) and the tokens as uint16 or uint32, documents separated by
the end-of-text token. It gets its final name when it is complete; the name is a digest of tokenizer and source files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.data import DataError
from runtime.data.cache import Log, build_lock, cache_folder, part_name, sync_folder
from runtime.data.tokenizer import Tokenizer

MAGIC = b"zerotop tokens 1\n"
HEADER_BYTES = 4096
PIECE_BYTES = 1 << 20
_BATCH_BYTES = 16 << 20

__all__ = ["Log", "TokenDataset", "cache_folder", "read_header", "token_file"]


class TokenDataset:
    """Windows of `seq_len + 1` tokens of a token file; neighbours share one token, so every token is predicted once.

    Raises DataError when the text is too short for one window, OSError or DataError when the file is no token file.
    """

    def __init__(self, path: Path, seq_len: int) -> None:
        header = read_header(path)
        self.path = path
        self.seq_len = seq_len
        self.token_count: int = header["tokens"]
        self.vocab_size: int = header["vocab_size"]
        self.eot: int | None = header["eot"]
        self.fingerprint: str = header["digest"]
        """Digest of the tokens, for comparing data between ranks and runs."""
        self.windows = max(0, (self.token_count - 1) // seq_len)
        if self.windows == 0:
            raise DataError(
                f"zerotop.data: the text has {self.token_count} tokens, but one sample needs zerotop.data.seq_len + 1 "
                f"= {seq_len + 1}; give more text in zerotop.data.files or lower zerotop.data.seq_len"
            )
        self._tokens = np.memmap(path, header["dtype"], mode="r", offset=HEADER_BYTES, shape=(self.token_count,))

    def __len__(self) -> int:
        return self.windows

    def rows(self, windows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens of windows, int64 [len(windows), seq_len + 1]. Raises IndexError for an unknown window."""
        rows = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in zip(rows, windows, strict=True):
            if not 0 <= window < self.windows:
                raise IndexError(f"window {window} of {self.windows}")
            first = int(window) * self.seq_len
            row[:] = self._tokens[first : first + self.seq_len + 1]
        return rows


def read_header(path: Path) -> dict[str, Any]:
    """The header of a token file, checked against the file's length. Raises DataError when it is not one."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        length = file.seek(0, os.SEEK_END)
    if not head.startswith(MAGIC):
        raise DataError(f"{path} is not a token file of this version")
    header: dict[str, Any] = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
    if length != HEADER_BYTES + header["tokens"] * np.dtype(header["dtype"]).itemsize:
        raise DataError(f"{path} is cut short; delete it to have it built again")
    return header


def token_file(files: Sequence[Path], tokenizer: Tokenizer, log: Log, cache: Path | None = None) -> Path:
    """Path of the token file of these documents, which is built if it does not exist yet.

    If several processes call this at once, one builds and the others wait. `log` gets a line with a percentage about
    once a second while building takes longer than that. Raises DataError for unreadable text or a cache that cannot be
    written.
    """
    cache = cache or cache_folder()
    path = cache / f"{_digest(files, tokenizer)}.bin"
    if _is_complete(path):
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with build_lock(path.with_suffix(".lock"), log, "the token file") as alone:
            if not _is_complete(path):
                if alone:
                    for left_over in cache.glob(f"{path.stem}.*.part"):
                        left_over.unlink(missing_ok=True)
                _build(path, files, tokenizer, log)
    except OSError as error:
        raise DataError(
            f"cannot write the token file in {cache}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder with room for it"
        ) from None
    return path


def _digest(files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Digest of format, tokenizer, and path, size and modification time of every document, in order."""
    made_from = hashlib.blake2b(MAGIC + tokenizer.digest.encode(), digest_size=16)
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise DataError(f"zerotop.data.files: cannot read {file}: {error.strerror}") from None
        made_from.update(f"\0{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return made_from.hexdigest()


def _is_complete(path: Path) -> bool:
    try:
        read_header(path)
    except (OSError, DataError, ValueError, KeyError):
        return False
    return True


def _build(path: Path, files: Sequence[Path], tokenizer: Tokenizer, log: Log) -> None:
    part = part_name(path)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    progress = _Progress(sum(file.stat().st_size for file in files), len(files), log)
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=16)
    count = replaced = 0
    try:
        with part.open("wb") as out:
            out.write(bytes(HEADER_BYTES))
            for pieces in _batches(files):
                encoded, bad = tokenizer.encode([piece for piece, _ in pieces])
                replaced += bad
                for tokens, (piece, last) in zip(encoded, pieces, strict=True):
                    ending = [tokenizer.eot] if last and tokenizer.eot is not None else []
                    stored = tokens.astype(dtype).tobytes() + np.asarray(ending, dtype).tobytes()
                    out.write(stored)
                    digest.update(stored)
                    count += len(tokens) + len(ending)
                    progress.add(len(piece))
            made = {"dtype": dtype.name, "tokens": count, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
            notes = {"digest": digest.hexdigest(), "documents": len(files), "replaced_characters": replaced}
            header = MAGIC + json.dumps(made | notes).encode()
            out.seek(0)
            out.write(header)
            out.flush()
            os.fsync(out.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    if replaced:
        log(f"the text is not all UTF-8: {replaced:,} characters were replaced")
    progress.done(count, path)


def _batches(files: Sequence[Path]) -> Iterator[list[tuple[bytes, bool]]]:
    """(piece, last of its document), some megabytes of them at a time so that a tokenizer can use its threads."""
    batch: list[tuple[bytes, bool]] = []
    size = 0
    for file in files:
        try:
            with file.open("rb") as source:
                for piece, last in _pieces(source):
                    batch.append((piece, last))
                    size += len(piece)
                    if size >= _BATCH_BYTES:
                        yield batch
                        batch, size = [], 0
        except OSError as error:
            raise DataError(f"zerotop.data.files: cannot read {file}: {error.strerror}") from None
    if batch:
        yield batch


def _pieces(source: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """A document in pieces of about a megabyte, cut after a newline where there is one, else between two characters."""
    rest = b""
    while chunk := source.read(PIECE_BYTES):
        text = rest + chunk
        cut = text.rfind(b"\n") + 1
        if cut == 0:
            lead = next((back for back in range(1, min(4, len(text)) + 1) if text[-back] & 0xC0 != 0x80), 0)
            cut = len(text) - lead or len(text)
        rest = text[cut:]
        if rest or len(chunk) == PIECE_BYTES:
            yield text[:cut], False
        else:
            yield text[:cut], True
            return
    yield rest, True


class _Progress:
    """Logs progress at most once a second, and nothing for builds that take less than a second."""

    def __init__(self, total_bytes: int, documents: int, log: Log) -> None:
        self._total, self._documents, self._log = total_bytes, documents, log
        self._seen = 0
        self._start = self._said = time.monotonic()

    def add(self, seen_bytes: int) -> None:
        self._seen += seen_bytes
        now = time.monotonic()
        if now - self._said >= 1.0 and self._seen < self._total:
            self._said = now
            self._log(
                f"tokenizing {self._documents:,} files: {100 * self._seen / self._total:.0f}% "
                f"of {self._total / 2**20:,.1f} MiB"
            )

    def done(self, tokens: int, path: Path) -> None:
        seconds = time.monotonic() - self._start
        if seconds >= 1.0:
            self._log(f"tokenized {self._documents:,} files into {tokens:,} tokens in {seconds:.1f} s ({path})")
