"""Writing the slices of one rank, in the file format of torch.distributed.checkpoint. Not collective.   (torch-free)

A data file is a row of files as torch.save makes them, one for each slice: zip archives with the tensor's description
(data.pkl) and its elements (data/0).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from runtime.checkpoint.format.legacy import METADATA
from runtime.checkpoint.format.pickles import metadata_pickle, tensor_pickle
from runtime.checkpoint.format.slices import Part
from runtime.checkpoint.format.tensors import Row, StoredTensor

_ALIGNMENT = 64
"""torch.load maps files whose elements begin at a multiple of this."""
_PADDING = 0x4246
"""Kind of the zip header field that pads, the same as torch's ("FB")."""
_HEADER_BYTES = 30
"""Size of a zip member's header without name and extra fields."""


def write_parts(folder: Path, rank: int, parts: Sequence[Part], read: Callable[[int], memoryview]) -> list[Row]:
    """Write this rank's parts to FOLDER/__RANK_0.distcp. read(index): the bytes of `parts[index]`, called when it is
    written. Returns the file location of each part."""
    rows: list[Row] = []
    if not parts:
        return rows
    path = folder / f"__{rank}_0.distcp"
    with path.open("wb") as out:
        for index, part in enumerate(parts):
            offset = out.tell()
            _write_tensor(_FileTail(out), part, read(index))
            rows.append(
                (part.name, part.dtype, part.total, part.start, part.numel, path.name, offset, out.tell() - offset)
            )
    return rows


def write_torch_metadata(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write .metadata, the pickled index that torch.distributed.checkpoint's tools read; zerotop reads tensors.json."""
    (folder / METADATA).write_bytes(metadata_pickle(tensors))


def _write_tensor(out: _FileTail, part: Part, content: memoryview) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), tensor_pickle(part.dtype, part.numel, part.nbytes))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        elements = zipfile.ZipInfo("archive/data/0")
        fields = len(elements.filename) + 4
        padding = -(out.tell() + _HEADER_BYTES + fields) % _ALIGNMENT
        elements.extra = _PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
        archive.writestr(elements, content)  # type: ignore[arg-type]  # any buffer will do
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


class _FileTail(io.RawIOBase):
    """What follows the current position of an open file, as a file of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + self._start if whence == io.SEEK_SET else offset
        return self._file.seek(at, whence) - self._start
