"""Reading tensors of a checkpoint: each rank fills its own pieces. Not collective."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from runtime.checkpoint.format.manifest import CheckpointError, root_cause
from runtime.checkpoint.format.plain import load_stream
from runtime.checkpoint.format.slices import Piece
from runtime.checkpoint.format.tensors import StoredPart, StoredTensor


def read_pieces(path: Path, tensors: Mapping[str, StoredTensor], pieces: Mapping[str, Piece]) -> None:
    """Fill `pieces`, by key, from the checkpoint at `path`; pieces of tensors that it lacks are left unchanged.
    `tensors`: the index from read_index. Raises CheckpointError where the data does not match the index."""
    wanted: dict[str, list[tuple[StoredPart, str]]] = defaultdict(list)
    for name, piece in pieces.items():
        if name not in tensors:
            continue
        if tensors[name].numel != piece.total:
            raise CheckpointError(
                f"checkpoint {path} has {tensors[name].numel:,} elements of {name}, expected {piece.total:,}"
            )
        for part in tensors[name].parts:
            if part.start < piece.start + piece.tensor.numel() and piece.start < part.start + part.numel:
                wanted[part.file].append((part, name))
    for file, reads in sorted(wanted.items()):
        try:
            opened = (path / file).open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {file}: {error.strerror or error}") from None
        with opened:
            for part, name in sorted(reads, key=lambda read: read[0].offset):
                try:
                    found = load_stream(FileSlice(opened, part.offset, part.nbytes))  # type: ignore[arg-type]
                    _check(found, part, tensors[name])
                except Exception as error:  # damaged bytes raise any exception
                    raise CheckpointError(
                        f"checkpoint {path} cannot be read: {name} in {file}: {root_cause(error)[:300]}"
                    ) from error
                piece = pieces[name]
                low = max(part.start, piece.start)
                high = min(part.start + part.numel, piece.start + piece.tensor.numel())
                piece.tensor[low - piece.start : high - piece.start].copy_(found[low - part.start : high - part.start])


def _check(found: Any, part: StoredPart, tensor: StoredTensor) -> None:
    expected = f"{part.numel} elements of {tensor.dtype}"
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"expected {expected}, found {type(found).__name__}")
    if found.shape != (part.numel,) or str(found.dtype) != f"torch.{tensor.dtype}":
        raise ValueError(f"expected {expected}, found shape {list(found.shape)} of {found.dtype}")


class FileSlice(io.RawIOBase):
    """A read-only file over `length` bytes of an open file, from `offset` on."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"negative position {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._length - self._at))
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view[:wanted])  # type: ignore[attr-defined]
        self._at += count
        return int(count)
