"""How figures are written: the only place that turns durations, bytes, rates and counts into text.

The screen, the command line and the messages of the supervisor all use these, so that one figure reads the same
everywhere. A missing figure is always `n/a`.
"""

from __future__ import annotations

import math
import time

from runtime.wire.sizes import format_count, format_size

MISSING = "n/a"


def as_float(value: float | None) -> float | None:
    """`value` as a finite float; None for NaN, for infinities and for integers beyond a float's range."""
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


# ---- times -----------------------------------------------------------------------------------------------------------
def duration_text(seconds: float | None) -> str:
    """An age, a limit or a time to go: 0.5 s, 42 s, 3m 05s, 2h 07m, 3d 4h."""
    number = as_float(seconds)
    if number is None:
        return MISSING
    if number < 0:
        return f"-{duration_text(-number)}"
    if 0 < number < 0.95:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h" if whole < 1e10 else f"{number / 86400:.0e} d"


def ms_text(milliseconds: float | None) -> str:
    """A measured time: 0.4 ms, 132 ms, 1.25 s, 12.5 s, 3m 05s."""
    number = as_float(milliseconds)
    if number is None:
        return MISSING
    if abs(number) >= 59_950:
        return duration_text(number / 1000)
    if abs(number) >= 999.5:
        return f"{number / 1000:.{1 if abs(number) >= 9995 else 2}f} s"
    return f"{number:.1f} ms" if abs(number) < 99.95 else f"{number:.0f} ms"


def clock_text(wall_s: float) -> str:
    """The local time of day: 14:03:59."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(wall_s))
    except (ValueError, OverflowError, OSError):  # not a number, or beyond the calendar
        return MISSING


def finish_text(wall_s: float, now_wall_s: float) -> str:
    """When something will be done, as a clock shows it: 14:47, Tue 14:47, 3 Dec 14:47."""
    try:
        at, now = time.localtime(wall_s), time.localtime(now_wall_s)
        if (at.tm_year, at.tm_yday) == (now.tm_year, now.tm_yday):
            return time.strftime("%H:%M", at)
        if 0 <= wall_s - now_wall_s < 6 * 86400:
            return time.strftime("%a %H:%M", at)
        return f"{at.tm_mday} {time.strftime('%b %H:%M' if at.tm_year == now.tm_year else '%b %Y', at)}"
    except (ValueError, OverflowError, OSError):  # beyond the calendar
        return MISSING


def time_text(wall_s: float | None) -> str:
    """ISO 8601 in local time with its offset, to the second; empty when there is none."""
    if wall_s is None:
        return ""
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(wall_s))
    except (ValueError, OverflowError, OSError):  # not a number, or beyond the calendar
        return ""
    return f"{text[:-2]}:{text[-2:]}"


# ---- bytes -----------------------------------------------------------------------------------------------------------
def bytes_text(count: float | None) -> str:
    """Binary units, three digits, at most eight characters: 512 B, 1.40 GiB, 39.5 GiB."""
    number = as_float(count)
    if number is None:
        return MISSING
    return format_size(number) if abs(number) < 2**60 else f"{number / 2**50:.0e} PiB"


def short_bytes_text(count: int) -> str:
    """For tables whose heading says that they are bytes, with 2^30 to the G: 39.5G."""
    return bytes_text(count).replace("iB", "").replace(" B", "").replace(" ", "")


def used_of(used: int, total: int) -> str:
    """Both in the unit of the total, 6.20/24.0 GiB; 442 MiB/24.0 GiB where that would round the figure away."""
    whole, part = bytes_text(total), bytes_text(used)
    if as_float(total) is None or total < 1 or as_float(used) is None:
        return part
    number, unit = whole.split()
    scale = total / float(number)
    scaled = used / scale
    if not 1 <= scaled < 1000 or unit == part.split()[1]:
        return f"{part.removesuffix(f' {unit}')}/{whole}"
    return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}/{whole}"


def byte_rate_text(bytes_per_s: float | None) -> str:
    """1.86 GiB/s."""
    return MISSING if as_float(bytes_per_s) is None else f"{bytes_text(bytes_per_s)}/s"


# ---- rates, counts, shares and other figures -------------------------------------------------------------------------
def count_text(value: float | None) -> str:
    """Decimal units, three digits: 950, 12.3K, 1.31B."""
    number = as_float(value)
    if number is None:
        return MISSING
    if abs(number) >= 1e15:
        return f"{number:.0e}"
    sign = "-" if number < 0 else ""
    return sign + format_count(round(abs(number)))


def flops_text(count: float | None) -> str:
    """An amount of arithmetic: 950 FLOPs, 43.1 GFLOPs, 1.2 PFLOPs."""
    number = as_float(count)
    if number is None:
        return MISSING
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}FLOPs"
    return f"{number:.0f} FLOPs"


def rate_text(tokens_per_s: float | None) -> str:
    """12.3K tokens/s."""
    return f"{count_text(tokens_per_s)} tokens/s"


def energy_text(joules: float | None) -> str:
    """Three digits: 512 J, 4.53 kJ, 12.1 MJ."""
    number = as_float(joules)
    if number is None:
        return MISSING
    for unit in ("J", "kJ", "MJ", "GJ"):
        if abs(number) < 999.5 or unit == "GJ":
            break
        number /= 1000
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"


def digits_text(value: float, digits: int = 3) -> str:
    """A number with so many significant digits; one that has more before the point, with all of those."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def figure_text(value: float | None) -> str:
    """A loss, a norm, a learning rate: four decimals below 10, four digits from there, powers of ten for the rest."""
    if value is None:
        return MISSING
    if as_float(value) is None:
        return "NaN" if value != value else "+inf" if value > 0 else "-inf"
    if value and (abs(value) < 1e-2 or abs(value) >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) >= 9.99995 else f"{value:.4f}"


def tick_text(value: float, step: float) -> str:
    """A round number at an axis whose ticks are `step` apart, with as many digits as tell it from its neighbours: 0,
    2.25, 12,500, 65.5K, 3e-4."""
    number, apart = as_float(value), as_float(step)
    if number is None or apart is None:
        return MISSING
    if abs(number) < 1e-9 * apart:
        return "0"
    size = max(abs(number), apart)
    if size >= 1e15 or size < 1e-3:
        return f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= scale and (scale > 1e3 or size >= 1e5):
            return f"{number / scale:.{_digits(apart / scale)}f}{unit}"
    return f"{number:,.{_digits(apart)}f}"


def _digits(step: float) -> int:
    """Decimals that tell multiples of `step` apart."""
    for digits in range(7):
        if abs(round(step, digits) - step) < 1e-6 * step:
            return digits
    return 7


def ms_tick_text(milliseconds: float, step: float) -> str:
    """The same for times: 250 ms, 1.5 s."""
    if max(abs(milliseconds), abs(step)) >= 1000:
        return f"{tick_text(milliseconds / 1000, step / 1000)} s"
    return f"{tick_text(milliseconds, step)} ms"


def percent_tick_text(share: float, step: float) -> str:
    """The same for shares: 41%."""
    return f"{tick_text(100 * share, 100 * step)}%"


def perplexity_text(value: float | None) -> str:
    """A perplexity in four digits: 8.938, 10.62, 200.3, 49152, 1.2e9."""
    number = as_float(value)
    if number is None or abs(number) < 1e-2:
        return figure_text(value)
    if abs(number) >= 1e6:
        return f"{number:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{number:.0f}" if abs(number) >= 999.95 else f"{number:.4g}"


def share_text(part: float, whole: float) -> str:
    """33%."""
    part_, whole_ = as_float(part), as_float(whole)
    share = as_float(part_ / whole_) if part_ is not None and whole_ else None
    return MISSING if share is None else f"{share:.0%}" if abs(share) < 100 else f"{share:.0e}"
