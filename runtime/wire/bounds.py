"""The types of message fields, with bounds that readers may rely on whoever sent the message.

Numbers fit in 64 bits, times can be displayed, texts are limited in length, and free-form data in depth and size. A
message out of bounds is malformed: the reader skips it, reports it, and continues (codec.py).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MAX_RANKS = 2**17
MAX_STEPS = 10**12
MAX_MICRO_STEPS = 10**6
MOST_SNAPSHOT_STEPS = 1000
"""Most optimizer steps that a memory snapshot may record."""
TEXT_KEPT = 32_768
"""Characters kept of a text; the sender's log file has all of it."""
NAME_KEPT = 1_000
"""Characters kept of a name."""
DEPTH_KEPT = 16
"""Maximum nesting of free-form data."""
ITEMS_KEPT = 10_000
"""Maximum number of values in free-form data."""

_INT64 = 2**63


def clip(text: str, kept: int = TEXT_KEPT) -> str:
    """`text`, shortened in the middle if it is longer than `kept` characters."""
    if len(text) <= kept:
        return text
    mark = f" [... {len(text) - kept:,} characters left out ...] "
    end = kept // 4
    return text[: kept - end] + mark + text[-end:]


def _clip_name(text: str) -> str:
    return text if len(text) <= NAME_KEPT else text[:NAME_KEPT] + "..."


def _without_surrogates(value: Any) -> Any:
    """Replace surrogates, as in file names that are not UTF-8, by question marks."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()
    return value


def _check_data(data: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for free-form data beyond the bounds."""
    level: list[Any] = [data]
    count = 0
    for _ in range(DEPTH_KEPT):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += value.keys()
                following += value.values()
            elif isinstance(value, list | tuple):
                following += value
            elif isinstance(value, int) and not -_INT64 <= value < _INT64:
                raise ValueError("a number that does not fit in 64 bits")
        count += len(following)
        if count > ITEMS_KEPT:
            raise ValueError(f"more than {ITEMS_KEPT:,} values")
        if not following:
            return data
        level = following
    raise ValueError(f"more than {DEPTH_KEPT} lists and objects inside each other")


Int64 = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
Count = Annotated[int, Field(ge=0, lt=_INT64)]
"""Bytes, items, numbers of packets and collectives, nanoseconds of a monotonic clock."""
RankNumber = Annotated[int, Field(ge=0, lt=MAX_RANKS)]
WorldSize = Annotated[int, Field(ge=1, le=MAX_RANKS)]
Pid = Annotated[int, Field(ge=1, lt=2**31)]
Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
MicroStep = Annotated[int, Field(ge=0, le=MAX_MICRO_STEPS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
WallSeconds = Annotated[float, Field(ge=0, lt=2**37, allow_inf_nan=False)]
"""Unix time up to the year 6325: what can be written as a date in every time zone."""
Text = Annotated[str, BeforeValidator(_without_surrogates), AfterValidator(clip)]
Name = Annotated[str, BeforeValidator(_without_surrogates), AfterValidator(_clip_name)]
Word = Annotated[str, Field(max_length=200)]
"""The name of a collective or phase: short and frequent, so its check must be cheap."""
Identity = Annotated[str, Field(max_length=200)]
"""An identifier that matches answers to commands; never shortened."""
Data = Annotated[dict[str, Any], AfterValidator(_check_data)]
