"""Figures as people read them, short enough for a table cell."""

from __future__ import annotations

from datetime import datetime

from textual.content import Content

from zerotop.clean import clean
from zerotop.output import as_float

STATES: dict[str, tuple[str, str]] = {
    "starting": ("◌", "primary"),
    "running": ("▶", "success"),
    "paused": ("‖", "warning"),
    "restarting": ("↻", "warning"),
    "stopping": ("◧", "warning"),
    "stopped": ("■", "foreground"),
    "finished": ("✔", "success"),
    "aborted": ("✖", "error"),
    "failed": ("✖", "error"),
    "stalled": ("▲", "error"),
    "unknown": ("?", "warning"),
}
"""Condition of a run -> (glyph, colour of [ui]); the word always stands beside the glyph."""
SEVERITIES: dict[str, tuple[str, str, str]] = {
    "debug": ("·", "debug", "muted"),
    "info": ("●", "info", "muted"),
    "warning": ("▲", "warn", "warning"),
    "error": ("✖", "error", "error"),
    "critical": ("✖", "crit", "error"),
}
"""Severity -> (glyph, word, colour of [ui])."""


def plain(text: str) -> Content:
    """`text` for a title, a label or a toast: never markup, and nothing in it steers the terminal."""
    return Content(clean(text))


def bytes_text(count: float) -> str:
    """Binary units in at most 8 characters: '512 KiB', '1.4 GiB'."""
    value = as_float(count)
    if value is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB" if abs(value) < 1000 else f"{value:.0e} TiB"


def used_of(used: int, total: int) -> str:
    """'6.2/24.0 GiB' in the unit of the total; '442 MiB/24.0 GiB' where that would round the figure away."""
    if as_float(used) is None or as_float(total) is None or max(used, total) >= 2**49:
        return bytes_text(used)
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if total >= scale:
            whole = f"{total / scale:.0f} {unit}" if total >= 100 * scale else f"{total / scale:.1f} {unit}"
            return f"{bytes_text(used)}/{whole}" if used < scale else f"{used / scale:.1f}/{whole}"
    return bytes_text(used)


def count_text(value: float | None) -> str:
    """Decimal units in at most 6 characters: '950', '12.3k', '1.31B'."""
    value = as_float(value)
    if value is None:
        return "n/a"
    for limit, scale, unit in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B"), (1e15, 1e12, "T")):
        if abs(value) < limit * 0.9995:
            scaled = value / scale
            if not unit:
                return f"{scaled:.0f}"
            return (
                f"{scaled:.0f}{unit}"
                if abs(scaled) >= 100
                else f"{scaled:.1f}{unit}"
                if abs(scaled) >= 10
                else f"{scaled:.2f}{unit}"
            )
    return f"{value:.0e}"


def duration_text(seconds: float | None) -> str:
    """'42 s', '3:07', '2:15:40', '3 d 04 h'."""
    seconds = as_float(seconds)
    if seconds is None:
        return "n/a"
    if seconds < 0:
        return f"-{duration_text(-seconds)}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400} d {whole // 3600 % 24:02d} h" if whole < 1e10 else f"{seconds / 86400:.0e} d"


def ms_text(milliseconds: float | None) -> str:
    """'0.4 ms', '132 ms', '4.1 s'."""
    milliseconds = as_float(milliseconds)
    if milliseconds is None:
        return "n/a"
    if abs(milliseconds) >= 9999.5:
        return f"{milliseconds / 1000:.1f} s" if abs(milliseconds) < 1e8 else f"{milliseconds / 1000:.0e} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 99.95 else f"{milliseconds:.0f} ms"


def figure_text(value: float | None) -> str:
    """A loss, a norm, a rate: four significant digits, and words for what is not a number."""
    if value is None:
        return "n/a"
    if as_float(value) is None:
        return "NaN" if value != value else "+inf" if value > 0 else "-inf"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def dots(micro_step: int, micro_steps: int, most: int = 8) -> str:
    """Where a rank is in its accumulation: done ●, current ◐, to come ○; scaled down to `most` dots. micro_step 0:
    outside.
    """
    if micro_steps <= 1:
        return ""
    shown = min(micro_steps, most)
    if not 0 < micro_step <= micro_steps:
        return "○" * shown
    current = (micro_step - 1) * shown // micro_steps
    return "●" * current + "◐" + "○" * (shown - current - 1)


def share_text(part: float, whole: float) -> str:
    """'33%'; 'n/a' of nothing."""
    part_, whole_ = as_float(part), as_float(whole)
    share = as_float(part_ / whole_) if part_ is not None and whole_ else None
    return "n/a" if share is None else f"{share:.0%}" if abs(share) < 100 else f"{share:.0e}"


def clock_text(wall_s: float) -> str:
    """The local time of day, eight characters; dashes for what is no time."""
    try:
        return datetime.fromtimestamp(wall_s).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):  # not a number, or beyond the calendar
        return "--:--:--"
