"""Parses and formats byte sizes and counts. Torch-free."""

from __future__ import annotations

import re
from decimal import Decimal

_BINARY = ("", "K", "M", "G", "T", "P")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
SMALLEST_BARE_COUNT = 1000
"""Smallest count that `parse_count` accepts without a unit."""


def parse_size(text: str) -> int:
    """The bytes in `80GiB`, `80GB` (10^9), `24G` (as GPUs are sold: 2^30) or `512B`. Raises ValueError for anything
    else.

    A number without a unit is refused, as 80 hardly means bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)(B?)\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size; expected a number with a unit, for example 80GiB, 80GB or 24G")
    if not match[2] and not match[4]:
        raise ValueError(f"expected a size with a unit, such as 80GiB; got {text.strip()}")
    power = _BINARY.index(match[2].upper())
    decimal = match[4] and not match[3]
    size = int(float(match[1]) * (1000 if decimal else 1024) ** power)
    if size < 1:
        raise ValueError(f"{text!r} is no size to plan with; expected more than 0 bytes")
    return size


def parse_count(text: str) -> int | None:
    """The number in `7B`, `124M`, `1.3b`, `7e9` or `3,311,872`; None if `text` is not a count.

    0, fractions, and numbers below SMALLEST_BARE_COUNT without a unit are not counts: 7 or 7.5 means billions.
    """
    match = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)(?:(e\+?\d{1,2})|\s*([KMBGT]?))\s*", text, re.IGNORECASE)
    if match is None:
        return None
    digits, exponent, unit = match[1].replace(",", "").replace("_", ""), match[2] or "", (match[3] or "").upper()
    count = Decimal(digits + exponent) * _COUNTS[unit]
    if not unit and (count != round(count) or (not exponent and count < SMALLEST_BARE_COUNT)):
        return None
    return round(count) or None


def format_size(size_bytes: float) -> str:
    """A size in binary units with three digits: `512 B`, `39.5 GiB`, `1.21 TiB`."""
    size, power = float(size_bytes), 0
    while abs(size) >= 999.5 and power < len(_BINARY) - 1:
        size, power = size / 1024, power + 1
    if power == 0:
        return f"{size:.0f} B"
    digits = 0 if abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {_BINARY[power]}iB"


def format_count(count: int) -> str:
    """A count with three digits: `3.31M`, `6.85B`."""
    for name in ("T", "B", "M", "K"):
        if count >= 0.9995 * _COUNTS[name]:
            number = count / _COUNTS[name]
            return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}{name}"
    return str(count)
