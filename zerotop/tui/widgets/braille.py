"""Lines and bands in braille: two by four dots a cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

# Bits of a braille cell by (column, row): https://www.unicode.org/charts/PDF/U2800.pdf
BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BLANK = 0x2800
Points = Sequence[tuple[float, float | None]]
"""(x, y) by rising x; None is a gap."""
Band = Sequence[tuple[float, float | None, float | None]]
"""(x, low, high) by rising x; None is a gap."""
Place = Callable[[float], int]
"""Value -> dot, from the left or from the top."""


class Grid:
    """The dots of `width` by `height` cells."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.cells = [[0] * width for _ in range(height)]

    def paint(self, column: int, upper: int, lower: int) -> None:
        """Set the dots of a dot column from `upper` to `lower`."""
        if 0 <= column < 2 * self.width:
            bits = BITS[column % 2]
            for row in range(max(0, upper), min(lower, self.height * 4 - 1) + 1):
                self.cells[row // 4][column // 2] |= bits[row % 4]

    def character(self, x: int, y: int) -> str:
        """What stands in a cell; empty without a dot."""
        bits = self.cells[y][x]
        return chr(BLANK | bits) if bits else ""


def draw_line(grid: Grid, points: Points, column: Place, row: Place) -> None:
    """Join the points. Where several share a dot column, it holds the range of them; gaps stay open."""
    columns: dict[int, tuple[float, float, float, float]] = {}  # column -> (first y, last y, lowest, highest)
    broken: set[int] = set()
    for x, y in points:
        at = column(x)
        if y is None or not math.isfinite(y):
            broken.add(at)
            continue
        seen = columns.get(at)
        columns[at] = (y, y, y, y) if seen is None else (seen[0], y, min(seen[2], y), max(seen[3], y))
    before: tuple[int, float] | None = None
    for at in sorted(columns):
        enter, leave, lowest, highest = columns[at]
        grid.paint(at, row(highest), row(lowest))
        if before is not None and not any(before[0] < gap <= at for gap in broken):
            _join(grid, before[0], row(before[1]), at, row(enter))
        before = (at, leave)


def draw_band(grid: Grid, band: Band, column: Place, row: Place) -> None:
    """Fill from the lowest to the highest in each dot column, and between the columns that have values."""
    pieces: list[dict[int, tuple[float, float]]] = [{}]
    for x, low, high in band:
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            pieces.append({})
            continue
        at = column(x)
        lower, upper = pieces[-1].get(at, (low, high))
        pieces[-1][at] = (min(low, lower), max(high, upper))
    for ranges in pieces:
        for at, (low, high) in ranges.items():
            grid.paint(at, row(high), row(low))
        for at, after in pairwise(sorted(ranges)):
            (low, high), (next_low, next_high) = ranges[at], ranges[after]
            for between in range(at + 1, after):
                share = (between - at) / (after - at)
                grid.paint(between, row(high + (next_high - high) * share), row(low + (next_low - low) * share))


def _join(grid: Grid, x0: int, y0: int, x1: int, y1: int) -> None:
    """A line between two points, as one vertical run of dots per column, so that steep parts have no holes."""
    previous = y0
    for column in range(x0 + 1, x1 + 1):
        here = round(y0 + (y1 - y0) * (column - x0) / (x1 - x0))
        start = previous + (1 if here > previous else -1 if here < previous else 0)
        grid.paint(column, min(start, here), max(start, here))
        previous = here
