"""A line plot in braille: two by four dots a cell, axis labels, gaps where a value is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.style import Style

from zerotop.tui.widgets.lines import Row

# Bits of a braille cell by (column, row): https://www.unicode.org/charts/PDF/U2800.pdf
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
BEYOND = 1e300
"""What is not below this can't be scaled without leaving a float's range, and is no figure worth drawing."""


def plot_rows(
    points: Sequence[tuple[float, float | None]],  # (x, y) by rising x
    width: int,
    height: int,
    label: Callable[[float], str],
    line: Style,
    faint: Style,
) -> list[Row]:
    """`height` rows of `width` cells: y labels on the left, the range of x in the last row. Says so if there is
    nothing to draw."""
    points = [(x, y if y is not None and abs(y) < BEYOND else None) for x, y in points if abs(x) < BEYOND]
    finite = [(x, y) for x, y in points if y is not None]
    if height < 2 or width < 12 or not finite:
        text = "no data yet" if not points else "no finite value yet" if not finite else ""
        rows = [Row() for _ in range(height)]
        if rows:
            rows[height // 2].add(text.center(width), faint)
        return rows
    low, high = _span(finite)
    axis_rows = 1 if height >= 4 else 0
    body = height - axis_rows
    top, bottom, middle = label(high), label(low), label((high + low) / 2)
    margin = max(len(top), len(bottom), len(middle)) + 1
    cells = _rasterise(points, low, high, width - margin, body)
    rows = []
    for y in range(body):
        text = top if y == 0 else bottom if y == body - 1 else middle if body >= 5 and y == body // 2 else ""
        row = Row().cell(text, margin - 1, faint, right=True).add("┤" if text else "│", faint)
        rows.append(row.add("".join(chr(_BLANK | bits) if bits else " " for bits in cells[y]), line))
    if axis_rows:
        first, last = f"{points[0][0]:.0f}", f"step {points[-1][0]:.0f}"
        row = Row().gap(margin - 1).add("└", faint)
        inner = width - margin
        text = first + last.rjust(inner - len(first)) if inner > len(first) + len(last) else last.rjust(inner)
        rows.append(row.cell(text, inner, faint))
    return rows


def _span(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low = min(y for _, y in points)
    high = max(y for _, y in points)
    if high - low < 1e-12 + 1e-9 * abs(high):
        pad = max(abs(high) * 0.05, 1e-12) if high else 1.0
        return low - pad, high + pad
    return low, high


def _rasterise(
    points: Sequence[tuple[float, float | None]], low: float, high: float, width: int, height: int
) -> list[list[int]]:
    """(height, width) braille bits. Each dot column holds the range of its values; neighbours are joined, gaps are
    not.
    """
    dots_x, dots_y = width * 2, height * 4
    first, last = points[0][0], points[-1][0]
    scale_x = (dots_x - 1) / (last - first) if last > first else 0.0
    scale_y = (dots_y - 1) / (high - low)
    columns: dict[int, tuple[float, float, float, float]] = {}  # column -> (first y, last y, lowest, highest)
    broken: set[int] = set()
    for x, y in points:
        column = round((x - first) * scale_x)
        if y is None or not math.isfinite(y):
            broken.add(column)
            continue
        seen = columns.get(column)
        columns[column] = (y, y, y, y) if seen is None else (seen[0], y, min(seen[2], y), max(seen[3], y))
    grid = [[0] * width for _ in range(height)]

    def row_of(y: float) -> int:
        return dots_y - 1 - round((min(max(y, low), high) - low) * scale_y)

    def paint(column: int, upper: int, lower: int) -> None:
        for row in range(upper, lower + 1):
            grid[row // 4][column // 2] |= _BITS[column % 2][row % 4]

    before: tuple[int, float] | None = None
    for column in sorted(columns):
        enter, leave, lowest, highest = columns[column]
        paint(column, row_of(highest), row_of(lowest))
        if before is not None and not any(before[0] < gap <= column for gap in broken):
            _join(before[0], row_of(before[1]), column, row_of(enter), paint)
        before = (column, leave)
    return grid


def _join(x0: int, y0: int, x1: int, y1: int, paint: Callable[[int, int, int], None]) -> None:
    """A line between two points, as one vertical run of dots per column, so that steep parts have no holes."""
    previous = y0
    for column in range(x0 + 1, x1 + 1):
        here = round(y0 + (y1 - y0) * (column - x0) / (x1 - x0))
        start = previous + (1 if here > previous else -1 if here < previous else 0)
        paint(column, min(start, here), max(start, here))
        previous = here
