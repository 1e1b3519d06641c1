"""A moment of a recording, as people write it: a step, a time of day, a time from the beginning or before the end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

EXPECTED = (
    "expected a step (1200), a time from the beginning (90s, 5m, 2h30m) or before the end (-10m), a time of day "
    "(14:03 or 14:03:20), a date and time (2026-11-30T14:03), a share (50%), start or end"
)
_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"([+-]?)\s*((?:\d+(?:\.\d+)?\s*[dhms]\s*)+)")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_DATES = ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d")


class MomentError(ValueError):
    """A text that names no moment, or none of this recording. The message says what was expected."""


@dataclass(frozen=True)
class Extent:
    """The ends of a recording in wall seconds, and the moment of a step (None: the recording does not have it)."""

    begin_s: float
    end_s: float
    step_at: Callable[[int], float | None]


def parse_moment(text: str, extent: Extent) -> float:
    """The wall time that `text` names. Raises MomentError."""
    word = text.strip().lower()
    if word in ("start", "begin", "beginning"):
        return extent.begin_s
    if word in ("end", "now"):
        return extent.end_s
    if match := re.fullmatch(r"(?:step\s*|s)?(\d+)", word):
        return _step(int(match[1]), extent)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", word):
        return _inside(text, extent.begin_s + (extent.end_s - extent.begin_s) * float(match[1]) / 100, extent)
    if match := _DURATION.fullmatch(word):
        pieces = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", match[2])
        seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
        return _inside(text, extent.end_s - seconds if match[1] == "-" else extent.begin_s + seconds, extent)
    if match := _CLOCK.fullmatch(word):
        return _clock(text, (int(match[1]), int(match[2]), int(match[3] or 0)), extent)
    for form in _DATES:
        try:
            date = time.strptime(text.strip(), form)
        except ValueError:
            continue
        return _inside(text, time.mktime(date), extent)
    raise MomentError(f"{text!r} is not a moment: {EXPECTED}")


def _step(step: int, extent: Extent) -> float:
    found = extent.step_at(step)
    if found is None:
        raise MomentError(f"the recording has no step {step}")
    return found


def _inside(text: str, wall_s: float, extent: Extent) -> float:
    if not extent.begin_s - 1 <= wall_s <= extent.end_s + 1:
        raise MomentError(
            f"{text.strip()} is outside the recording, which is from {_date(extent.begin_s)} to {_date(extent.end_s)}"
        )
    return min(max(wall_s, extent.begin_s), extent.end_s)


def _clock(text: str, clock: tuple[int, int, int], extent: Extent) -> float:
    """The first time in the recording at which a clock showed this."""
    hour, minute, second = clock
    if hour > 23 or minute > 59 or second > 59:
        raise MomentError(f"{text.strip()} is not a time of day: {EXPECTED}")
    day = time.localtime(extent.begin_s)
    wall_s = time.mktime((day.tm_year, day.tm_mon, day.tm_mday, hour, minute, second, 0, 0, -1))
    if wall_s < extent.begin_s - 1:
        wall_s = time.mktime((day.tm_year, day.tm_mon, day.tm_mday + 1, hour, minute, second, 0, 0, -1))
    return _inside(text, wall_s, extent)


def _date(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))
