"""Reads the traces that torch.profiler writes, event by event: they may be too large to be loaded as a whole."""

from __future__ import annotations

import codecs
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime.wire.profile import CLOCK

CHUNK_BYTES = 1 << 20
LARGEST_EVENT = 64 << 20
"""Characters of one event; a file with a larger one is no trace."""
_SEPARATORS = re.compile(r"[\s,]*")
_EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
_MARK = re.compile(rb'"name"\s*:\s*"' + CLOCK.encode() + rb'(\d+)"[^{}]*?"ts"\s*:\s*([0-9.]+)')


class PartClock(NamedTuple):
    """How a part's times become CLOCK_MONOTONIC: ns = us * 1000 + offset_ns."""

    offset_ns: int
    marks: int
    first_ns: int
    last_ns: int
    """CLOCK_MONOTONIC at the first and the last mark: the boundaries around the profiled steps."""


def events_of(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace in the order of the file. Raises ValueError for a file that is none, or damaged."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("replace")
    with open(path, "rb") as file:
        text, at, inside = "", 0, False
        while True:
            chunk = file.read(CHUNK_BYTES)
            text, at = text[at:] + utf8.decode(chunk, final=not chunk), 0
            if not inside:
                found = _EVENTS.search(text)
                if found is None:
                    if not chunk or len(text) > LARGEST_EVENT:
                        raise ValueError(f"{path.name} is no trace: it has no events")
                    continue
                at, inside = found.end(), True
            while True:
                separators = _SEPARATORS.match(text, at)
                assert separators is not None
                at = separators.end()
                if text.startswith("]", at):
                    return
                try:
                    event, at = decoder.raw_decode(text, at)
                except ValueError:
                    break  # the rest of it is in the next chunk
                if isinstance(event, dict):
                    yield event
            if not chunk or len(text) - at > LARGEST_EVENT:
                raise ValueError(f"{path.name} is damaged: it ends within an event")


def clock_of(path: Path) -> PartClock | None:
    """The clock of a part, from the marks that the rank has recorded in it; None if it has none."""
    offsets, times = [], []
    with open(path, "rb") as file:
        rest = b""
        while chunk := file.read(CHUNK_BYTES):
            data = rest + chunk
            end = 0
            for found in _MARK.finditer(data):
                mono_ns = int(found[1])
                times.append(mono_ns)
                offsets.append(mono_ns - round(float(found[2]) * 1000))
                end = found.end()
            rest = data[max(end, len(data) - 4096) :]
    if not offsets:
        return None
    return PartClock(round(statistics.median(offsets)), len(offsets), min(times), max(times))
