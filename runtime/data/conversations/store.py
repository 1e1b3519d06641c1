"""Samples of prepared data in a folder: tokens and masks as memory-mapped arrays, and what was counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data import DataError

FORMAT = 2


class Store:
    """Prepared samples. `meta`: what build.py counted.

    Sample i is `tokens[offsets[i] : offsets[i + 1]]`; it is row `numbers[i]` of file `files[i]`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = read_meta(folder)
        count = self.meta["samples"]
        self.lengths = _map(folder / "lengths.bin", np.int32, count)
        self.numbers = _map(folder / "numbers.bin", np.int64, count)
        self.files = _map(folder / "files.bin", np.int32, count)
        self.offsets = np.zeros(count + 1, np.int64)
        np.cumsum(self.lengths, out=self.offsets[1:])
        total = int(self.offsets[-1])
        self.tokens = _map(folder / "tokens.bin", self.meta["dtype"], total)
        self.trained = _map(folder / "trained.bin", np.uint8, total)
        counted = _map(folder / "counted.bin", np.int32, count)
        self.counted = counted
        """Targets of each sample that the loss counts: its trained tokens but the first, which nothing predicts."""
        self.cut = _map(folder / "cut.bin", np.int32, count)
        """Tokens that each sample lost to truncation."""

    def __len__(self) -> int:
        return len(self.lengths)


def read_meta(folder: Path) -> dict[str, Any]:
    """What was counted. Raises OSError or DataError when there is no complete store."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta.get("store") != FORMAT:
        raise DataError(f"{folder} holds prepared data of another version; delete it to have it built again")
    expected = {"tokens.bin": meta["tokens"] * np.dtype(meta["dtype"]).itemsize, "trained.bin": meta["tokens"]}
    for name, size in expected.items():
        if (folder / name).stat().st_size != size:
            raise DataError(f"{folder} is cut short; delete it to have it built again")
    return meta


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a store."""
    try:
        read_meta(folder)
    except (OSError, DataError, ValueError, KeyError):
        return False
    return True


def _map(path: Path, dtype: Any, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that it is on the disk before the store is renamed."""
    with path.open("wb") as out:
        out.write(np.ascontiguousarray(array).data)
        out.flush()
        os.fsync(out.fileno())
