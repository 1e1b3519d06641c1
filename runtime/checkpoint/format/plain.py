"""Files of plain data and tensors in torch.save's format, read without running any code from them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from runtime.checkpoint.format.manifest import CheckpointError, regular_size, root_cause


def to_bytes(value: Any) -> bytes:
    """`value` in torch.save's format."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_stream(stream: IO[bytes]) -> Any:
    """Load plain data and tensors that torch.save wrote. No code is run, and compressed content is refused, so that
    memory is bounded by the stream's size. Damaged bytes raise any exception."""
    with zipfile.ZipFile(stream) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its content is compressed, which torch.save never writes")
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def load_file(path: Path, name: str) -> dict[str, Any]:
    """The dictionary in a small file of the checkpoint at `path`. Raises CheckpointError if it holds anything else."""
    try:
        regular_size(path, name)
        with (path / name).open("rb") as stream:
            found = load_stream(stream)
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, found {type(found).__name__}")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {name}: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {name} was not written by zerotop ({root_cause(error)[:300]})"
        ) from None
    return found
