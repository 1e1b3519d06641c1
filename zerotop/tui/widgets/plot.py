"""A line plot in braille: two by four dots a cell, axis labels, gaps where a value is not a number; over it perhaps a
second line, whose points are marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.segment import Segment
from rich.style import Style

from zerotop.tui.widgets.lines import Row

# Bits of a braille cell by (column, row): https://www.unicode.org/charts/PDF/U2800.pdf
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
BEYOND = 1e300
"""What is not below this can't be scaled without leaving a float's range, and is no figure worth drawing."""


MARK, BEST_MARK = "●", "◆"


@dataclass(frozen=True)
class Marked:
    """A second line on the same axes. Each of its points has a mark, and the one at `best` (an x) another one."""

    points: Sequence[tuple[float, float | None]]  # (x, y) by rising x
    style: Style
    best: float | None = None


def plot_rows(
    points: Sequence[tuple[float, float | None]],  # (x, y) by rising x
    width: int,
    height: int,
    label: Callable[[float], str],
    line: Style,
    faint: Style,
    marked: Marked | None = None,
) -> list[Row]:
    """`height` rows of `width` cells: y labels on the left, the range of x in the last row. Says so if there is
    nothing to draw."""
    points = _drawable(points)
    others = _drawable(marked.points) if marked is not None else []
    finite = [(x, y) for x, y in (*points, *others) if y is not None]
    if height < 2 or width < 12 or not finite:
        text = "no data yet" if not points and not others else "no finite value yet" if not finite else ""
        rows = [Row() for _ in range(height)]
        if rows:
            rows[height // 2].add(text.center(width), faint)
        return rows
    low, high = _span(finite)
    axis_rows = 1 if height >= 4 else 0
    body = height - axis_rows
    top, bottom, middle = label(high), label(low), label((high + low) / 2)
    margin = max(len(top), len(bottom), len(middle)) + 1
    steps = [x for x, _ in (*points, *others)]
    frame = _Frame(min(steps), max(steps), low, high, width - margin, body)
    cells = _rasterise(points, frame)
    over = _marked_cells(others, marked, frame) if marked is not None else {}
    rows = []
    for y in range(body):
        text = top if y == 0 else bottom if y == body - 1 else middle if body >= 5 and y == body // 2 else ""
        row = Row().cell(text, margin - 1, faint, right=True).add("┤" if text else "│", faint)
        rows.append(row.extend(_line(cells[y], y, line, over, marked)))
    if axis_rows:
        first, last = f"{frame.first:.0f}", f"step {frame.last:.0f}"
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


@dataclass(frozen=True)
class _Frame:
    """The ranges of both axes, and the cells that they take."""

    first: float
    last: float
    low: float
    high: float
    width: int
    height: int

    def column(self, x: float) -> int:
        """The dot column, two per cell."""
        return (
            round((x - self.first) * (self.width * 2 - 1) / (self.last - self.first)) if self.last > self.first else 0
        )

    def row(self, y: float) -> int:
        """The dot row from the top, four per cell."""
        dots = self.height * 4
        return dots - 1 - round((min(max(y, self.low), self.high) - self.low) * (dots - 1) / (self.high - self.low))


def _drawable(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    return [
        (x, y if y is not None and math.isfinite(y) and abs(y) < BEYOND else None) for x, y in points if abs(x) < BEYOND
    ]


def _marked_cells(
    points: Sequence[tuple[float, float | None]], marked: Marked, frame: _Frame
) -> dict[tuple[int, int], str]:
    """(column, row) of a cell -> what the second line has there."""
    cells = {
        (x, y): chr(_BLANK | bits)
        for y, line in enumerate(_rasterise(points, frame))
        for x, bits in enumerate(line)
        if bits
    }
    for x, value in sorted(points, key=lambda point: point[0] == marked.best):  # the best last, over its neighbours
        if value is not None:
            place = frame.column(x) // 2, frame.row(value) // 4
            cells[place] = BEST_MARK if x == marked.best else MARK
    return cells


def _line(
    cells: Sequence[int], y: int, style: Style, over: dict[tuple[int, int], str], marked: Marked | None
) -> list[Segment]:
    """A line of both: marks cover the first line, and the first line covers the rest of the second."""
    shown: list[tuple[str, Style]] = []
    for x, bits in enumerate(cells):
        other = over.get((x, y))
        if marked is not None and other is not None and (other in (MARK, BEST_MARK) or not bits):
            shown.append((other, marked.style))
        else:
            shown.append((chr(_BLANK | bits) if bits else " ", style))
    return [Segment("".join(cell for cell, _ in run), key) for key, run in groupby(shown, lambda cell: cell[1])]


def _rasterise(points: Sequence[tuple[float, float | None]], frame: _Frame) -> list[list[int]]:
    """(height, width) braille bits. Each dot column holds the range of its values; neighbours are joined, gaps are
    not.
    """
    width, height = frame.width, frame.height
    columns: dict[int, tuple[float, float, float, float]] = {}  # column -> (first y, last y, lowest, highest)
    broken: set[int] = set()
    for x, y in points:
        column = frame.column(x)
        if y is None or not math.isfinite(y):
            broken.add(column)
            continue
        seen = columns.get(column)
        columns[column] = (y, y, y, y) if seen is None else (seen[0], y, min(seen[2], y), max(seen[3], y))
    grid = [[0] * width for _ in range(height)]

    def paint(column: int, upper: int, lower: int) -> None:
        for row in range(upper, lower + 1):
            grid[row // 4][column // 2] |= _BITS[column % 2][row % 4]

    before: tuple[int, float] | None = None
    for column in sorted(columns):
        enter, leave, lowest, highest = columns[column]
        paint(column, frame.row(highest), frame.row(lowest))
        if before is not None and not any(before[0] < gap <= column for gap in broken):
            _join(before[0], frame.row(before[1]), column, frame.row(enter), paint)
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
