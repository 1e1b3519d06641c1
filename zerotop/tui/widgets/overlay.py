"""Several curves in one plot of braille cells, each in its own style; where they meet, the last one is on top."""

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
LOW, HIGH = 0.005, 0.995
"""Quantiles of all values that the plot reaches: one spike must not crush the rest."""


@dataclass(frozen=True)
class Line:
    """points: (x, y) by rising x."""

    points: Sequence[tuple[float, float]]
    style: Style


def overlay_rows(
    lines: Sequence[Line],
    width: int,
    height: int,
    y_text: Callable[[float], str],
    x_text: Callable[[float], str],
    faint: Style,
    mark: float | None = None,
) -> list[Row]:
    """`height` rows of `width` cells with an axis on the left and one below. mark: an x at which a dotted line stands
    (where a branch begins). Says so if there is nothing to draw."""
    lines = [Line([(x, y) for x, y in line.points if math.isfinite(y)], line.style) for line in lines]
    values = sorted(y for line in lines for _, y in line.points)
    if height < 3 or width < 16 or not values:
        rows = [Row() for _ in range(height)]
        if rows:
            rows[height // 2].add("no data yet".center(width)[:width], faint)
        return rows
    low, high = values[int(LOW * (len(values) - 1))], values[math.ceil(HIGH * (len(values) - 1))]
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - max(1e-9, abs(low) * 0.05), high + max(1e-9, abs(high) * 0.05)
    xs = [x for line in lines for x, _ in (line.points[:1] + line.points[-1:])]  # type: ignore[operator]
    first, last = min(xs), max(xs)
    body = height - 1
    texts = {0: y_text(high), body // 2: y_text((low + high) / 2), body - 1: y_text(low)}
    margin = max(len(text) for text in texts.values()) + 1
    inner = width - margin
    cells: list[list[tuple[int, Style]]] = [[(0, faint)] * inner for _ in range(body)]

    def column(x: float) -> int:
        return round((x - first) * (inner * 2 - 1) / (last - first)) if last > first else 0

    def row_of(y: float) -> int:
        return body * 4 - 1 - round((min(max(y, low), high) - low) * (body * 4 - 1) / (high - low))

    if mark is not None and first < mark < last:
        for y in range(body):
            cells[y][column(mark) // 2] = (_BITS[0][1] | _BITS[0][3], faint)
    for line in lines:
        for at, upper, lower in _runs(line.points, column, row_of):
            for dot in range(upper, lower + 1):
                bits, style = cells[dot // 4][at // 2]
                bits = bits if style is line.style else 0
                cells[dot // 4][at // 2] = (bits | _BITS[at % 2][dot % 4], line.style)
    rows = []
    for y in range(body):
        text = texts.get(y, "")
        row = Row().cell(text, margin - 1, faint, right=True).add("┤" if text else "│", faint)
        for style, run in groupby(cells[y], lambda cell: cell[1]):
            row.extend([Segment("".join(chr(0x2800 | bits) if bits else " " for bits, _ in run), style)])
        rows.append(row)
    left, right = x_text(first), x_text(last)
    rows.append(Row().gap(margin - 1).add("└", faint).add(left + right.rjust(max(1, inner - len(left))), faint))
    return rows


def _runs(
    points: Sequence[tuple[float, float]], column: Callable[[float], int], row_of: Callable[[float], int]
) -> list[tuple[int, int, int]]:
    """(dot column, upper, lower) of vertical runs of dots: the range of the values of a column, joined with the one
    before."""
    ranges: dict[int, tuple[int, int, int]] = {}  # column -> upper, lower, last
    for x, y in points:
        at, dot = column(x), row_of(y)
        upper, lower, _ = ranges.get(at, (dot, dot, dot))
        ranges[at] = min(upper, dot), max(lower, dot), dot
    runs: list[tuple[int, int, int]] = []
    before: tuple[int, int] | None = None
    for at, (upper, lower, last) in sorted(ranges.items()):
        if before is not None:
            start, height = before
            middle = (upper + lower) // 2
            previous = height
            for between in range(start + 1, at):
                here = round(height + (middle - height) * (between - start) / (at - start))
                runs.append((between, min(previous, here), max(previous, here)))
                previous = here
            upper, lower = min(upper, previous), max(lower, previous)
        runs.append((at, upper, lower))
        before = at, last
    return runs
