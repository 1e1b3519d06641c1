"""A process that encodes chunks: a recipe and chunks come in on stdin, what they became goes into files.

It is started as `python -m runtime.data.conversations.worker FOLDER`, not forked, and imports neither torch nor
transformers. Each message is a length of eight bytes and a pickle.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.data import DataError
from runtime.data.conversations.chunks import Chunk
from runtime.data.conversations.encode import Encoder, Recipe

_LENGTH = struct.Struct("<Q")
ARRAYS = ("tokens", "trained", "lengths", "numbers", "counted", "cut")


@dataclass
class Outcome:
    """What became of a chunk. The arrays are in files named by its number, unless no sample came of it."""

    number: int
    source: int = 0
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    wrong: str = ""
    complaint: str = ""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """The first broken lines."""
    broken_count: int = 0
    error: str = ""
    """The message of a DataError."""


def encode_chunk(encoder: Encoder, number: int, chunk: Chunk, folder: Path, check_only: bool = False) -> Outcome:
    """Encode a chunk into files in `folder`. `check_only`: only look for broken lines."""
    made = Outcome(number, chunk.source)
    broken: list[tuple[int, str]] = []
    try:
        if check_only:
            for _ in chunk.numbered(broken):
                pass
        else:
            encoded = encoder.encode(chunk.form, chunk.numbered(broken), chunk.split)
            made.rows, made.samples, made.tokens = encoded.rows, len(encoded.lengths), len(encoded.tokens)
            made.dropped, made.wrong, made.complaint = encoded.dropped, encoded.wrong, encoded.complaint
            if made.samples:
                arrays = {"counted": count_targets(encoded.trained, encoded.lengths)}
                arrays |= {name: getattr(encoded, name) for name in ARRAYS if name not in arrays}
                for name, array in arrays.items():
                    array.tofile(folder / f"{number}.{name}")
    except DataError as error:
        made.error = str(error)
    except OSError as error:
        made.error = f"cannot read {chunk.path}: {error.strerror or error}"
    made.broken, made.broken_count = broken[:1], len(broken)
    return made


def count_targets(trained: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Per sample, its trained tokens without the first, which nothing predicts; int32."""
    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    sums = np.add.reduceat(trained, starts, dtype=np.int64)
    return (sums - trained[starts]).astype(np.int32)


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read one message. Raises EOFError when the other end is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    data = stream.read(_LENGTH.unpack(head)[0])
    return pickle.loads(data)


def main() -> None:
    """Encode chunks until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one
    folder = Path(sys.argv[1])
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between messages
    recipe: Recipe = receive(source)
    encoder = Encoder(recipe)
    while True:
        try:
            number, chunk, check_only = receive(source)
        except EOFError:
            return
        send(sink, encode_chunk(encoder, number, chunk, folder, check_only))


if __name__ == "__main__":
    # Not this copy of the module, whose classes the other end would look for in its own __main__.
    from runtime.data.conversations.worker import main as run

    run()
