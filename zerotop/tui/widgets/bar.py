"""Bars in character cells: one share, or a whole split by category."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style

from zerotop.format import as_float
from zerotop.state.memory import DERIVED_CATEGORIES, category_label

KEPT = 0.75
"""The share of its length that the largest part of a bar keeps when it makes room for small ones."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def split_cells(values: Sequence[float], total: float, width: int) -> list[int]:
    """Cells for each value on a bar of `width` cells that stands for `total`, by largest remainders.

    The cells never exceed `width`, and the filled part is to scale. A small but non-zero value gets a cell if the
    largest part can spare one: that keeps twice as many and most of its own, because a part of 1% must not look like
    one of 33%.
    """
    total = max(as_float(total) or 0.0, 0.0)
    known = [max(0.0, as_float(value) or 0.0) for value in values]
    scale = max(total, sum(known))
    if width <= 0 or total <= 0 or not math.isfinite(scale):
        return [0] * len(known)
    exact = [value / scale * width for value in known]
    cells = [int(part) for part in exact]
    filled = min(width, max(round(sum(exact)), int(any(known))))
    by_remainder = sorted(range(len(known)), key=lambda i: exact[i] - cells[i], reverse=True)
    for i in by_remainder:
        if sum(cells) < filled and exact[i] > cells[i]:
            cells[i] += 1
    for i, part in enumerate(exact):
        if part > 0 and not cells[i]:
            donor = max(range(len(cells)), key=lambda j: cells[j])
            if cells[donor] > 2 and cells[donor] - 1 >= KEPT * exact[donor]:
                cells[donor] -= 1
                cells[i] = 1
    return cells


def stacked_bar(parts: Sequence[tuple[str, float, Style]], total: float, width: int, empty: Style) -> list[Segment]:
    """A bar of labelled blocks: each part has its name where it fits, else its letter, so it can be read without
    colour."""
    cells = split_cells([value for _, value, _ in parts], total, width)
    segments = [
        Segment(block_label(name, size), style) for (name, _, style), size in zip(parts, cells, strict=True) if size
    ]
    rest = width - sum(cells)
    return [*segments, Segment("·" * rest, empty)] if rest > 0 else segments


def block_label(name: str, size: int) -> str:
    """The name of a category where it fits, else its letter."""
    label = category_label(name)
    return label.center(size) if size >= len(label) + 2 else category_letter(name).center(size)


def category_letter(name: str) -> str:
    """One letter for each category, small for the derived ones. K is the checkpoint copy: C is communication."""
    if name == "snapshot":
        return "K"
    return name[:1] if name in DERIVED_CATEGORIES else name[:1].upper()


def meter(share: float, width: int, fill: Style, empty: Style) -> list[Segment]:
    """A share (0..1) with a precision of an eighth of a cell."""
    share = min(1.0, max(0.0, as_float(share) or 0.0))
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    text = "█" * full + (EIGHTHS[part] if part else "")
    return [Segment(text, fill), Segment("░" * (width - len(text)), empty)]


def thin_bar(share: float, width: int, fill: Style, empty: Style) -> list[Segment]:
    """A progress line with a precision of half a cell."""
    share = min(1.0, max(0.0, as_float(share) or 0.0))
    halves = round(share * width * 2)
    full, half = divmod(halves, 2)
    return [Segment("━" * full + "╸" * half, fill), Segment("─" * (width - full - half), empty)]
