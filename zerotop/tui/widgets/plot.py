"""A plot in character cells: lines, bands behind them, points with marks, round numbers at the axes, and a cursor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from zerotop.format import tick_text
from zerotop.tui.widgets.braille import Band, Grid, Points, draw_band, draw_line
from zerotop.tui.widgets.lines import PLAIN, Row
from zerotop.tui.widgets.scale import Axis, round_step, value_axis

BEYOND = 1e300
"""What is not below this can't be scaled without leaving a float's range, and is no figure worth drawing."""
MARK, BEST_MARK, CLIPPED = "●", "◆", "▲"
GRID_FROM, AXIS_FROM, LABELS_FROM = 9, 6, 4
"""Rows of a plot from which grid lines, a line for the x axis, and the numbers below it are worth their room."""


@dataclass(frozen=True)
class Curve:
    """`points` in `style`. band: the range of the values around a smoothed line; marked: each point has a mark, and the
    one at `best` (an x) another one."""

    points: Points
    style: Style
    band: Band = ()
    band_style: Style = PLAIN
    marked: bool = False
    best: float | None = None


@dataclass(frozen=True)
class AxisMark:
    """Something that happened at `x`: a letter or sign on the x axis."""

    x: float
    sign: str
    style: Style


@dataclass(frozen=True)
class Look:
    """How a plot is drawn. label: a y value and the distance of two ticks -> text. window: the range of x; None: that
    of the points. unit: what the x are."""

    faint: Style
    grid: Style
    cursor_style: Style
    label: Callable[[float, float], str] = tick_text
    window: tuple[float, float] | None = None
    log: bool = False
    marks: Sequence[AxisMark] = ()
    cursor: float | None = None
    unit: str = "step"


@dataclass(frozen=True)
class Drawn:
    """The rows, and where in them x is: the plot takes the cells from `left` on, and its axis is `x`."""

    rows: list[Row]
    left: int = 0
    x: Axis | None = None


def draw_plot(curves: Sequence[Curve], width: int, height: int, look: Look) -> Drawn:
    """`height` rows of `width` cells. Says so if there is nothing to draw."""
    curves = [_drawable(curve, look.window) for curve in curves]
    shown = [y for curve in curves for _, y in curve.points if y is not None]
    shown += [y for curve in curves for _, low, high in curve.band for y in (low, high) if y is not None]
    if height < 2 or width < 12 or not shown:
        some = any(curve.points or curve.band for curve in curves)
        text = "no data yet" if not some else "no finite value yet" if not shown else ""
        rows = [Row() for _ in range(height)]
        if rows:
            rows[height // 2].add(text.center(width)[:width], look.faint)
        return Drawn(rows)
    below = int(height >= LABELS_FROM) + int(height >= AXIS_FROM)
    body = height - below
    y_axis = value_axis(shown, body * 4, look.log)
    ticks = _y_ticks(y_axis, body, look)
    margin = max((cell_len(text) for text in ticks.values()), default=0) + 1
    first, last = look.window or _extent(curves)
    x_axis = Axis(first, last, 2 * (width - margin))
    layers = _Layers(width - margin, body)
    for curve in curves:
        layers.add(curve, x_axis, y_axis)
    inner = layers.rows(look, x_axis, set(ticks) if height >= GRID_FROM else set())
    rows = []
    for y, segments in enumerate(inner):
        text = ticks.get(y, "")
        row = Row().add(text.rjust(margin - 1), look.faint).add("┤" if text else "│", look.faint)
        rows.append(row.extend(segments, width - margin))
    rows += _below(look, x_axis, width, margin, below)
    return Drawn(rows, margin, x_axis)


def _drawable(curve: Curve, window: tuple[float, float] | None) -> Curve:
    """Without what can't be scaled or lies outside of the window."""

    def usable(y: float | None) -> float | None:
        return y if y is not None and math.isfinite(y) and abs(y) < BEYOND else None

    def inside(x: float) -> bool:
        return abs(x) < BEYOND and (window is None or window[0] <= x <= window[1])

    points = [(x, usable(y)) for x, y in curve.points if inside(x)]
    band = [(x, usable(low), usable(high)) for x, low, high in curve.band if inside(x)]
    return Curve(points, curve.style, band, curve.band_style, curve.marked, curve.best)


def _extent(curves: Sequence[Curve]) -> tuple[float, float]:
    xs = [x for curve in curves for x, _ in curve.points] + [one[0] for curve in curves for one in curve.band]
    return min(xs), max(xs)


def _y_ticks(axis: Axis, body: int, look: Look) -> dict[int, str]:
    """Row of the body -> label. Where no round number falls into the range, its ends stand there."""
    most = max(2, min(6, body // 2))
    values = next((ticks for more in range(4) if len(ticks := axis.ticks(most + more)) >= 2), [axis.low, axis.high])
    gap = min((abs(b - a) for a, b in pairwise(values)), default=1.0)
    found: dict[int, str] = {}
    for value in values:
        row = (axis.dots - 1 - axis.at(value)) // 4
        step = gap if not axis.log else abs(value)
        if row not in found:
            found[row] = look.label(value, step)
    return found


class _Layers:
    """What stands in each cell of the body: bands below lines, lines below marks."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.cells: list[list[tuple[str, Style] | None]] = [[None] * width for _ in range(height)]

    def add(self, curve: Curve, x: Axis, y: Axis) -> None:
        def row(value: float) -> int:
            return y.dots - 1 - y.at(value)

        def placed(value: float | None) -> float | None:
            return None if value is not None and y.log and value <= 0 else value

        if curve.band:
            grid = Grid(self.width, self.height)
            draw_band(grid, [(at, placed(low), placed(high)) for at, low, high in curve.band], x.at, row)
            self._put(grid, curve.band_style)
            self._clip([(at, high) for at, _, high in curve.band], curve.band_style, x, y)
        if curve.points:
            grid = Grid(self.width, self.height)
            draw_line(grid, [(at, placed(value)) for at, value in curve.points], x.at, row)
            self._put(grid, curve.style)
            self._clip(curve.points, curve.style, x, y)
        if curve.marked:
            for at, value in sorted(curve.points, key=lambda point: point[0] == curve.best):  # the best one last
                if value is not None and not (y.log and value <= 0):
                    sign = BEST_MARK if at == curve.best else MARK
                    self.cells[row(value) // 4][x.at(at) // 2] = (sign, curve.style)

    def _put(self, grid: Grid, style: Style) -> None:
        for cell_y, line in enumerate(grid.cells):
            for cell_x, bits in enumerate(line):
                if bits:
                    self.cells[cell_y][cell_x] = (grid.character(cell_x, cell_y), style)

    def _clip(self, points: Points, style: Style, x: Axis, y: Axis) -> None:
        """A sign at the upper edge where values are above it."""
        for at, value in points:
            if value is not None and value > y.high:
                self.cells[0][x.at(at) // 2] = (CLIPPED, style)

    def rows(self, look: Look, x: Axis, grid_rows: set[int]) -> list[list[Segment]]:
        cursor = x.at(look.cursor) // 2 if look.cursor is not None and x.low <= look.cursor <= x.high else None
        blank, rule, line = (" ", look.faint), ("╌", look.grid), ("│", look.cursor_style)
        found = []
        for y, cells in enumerate(self.cells):
            empty = rule if y in grid_rows else blank
            shown = [cell or (line if at == cursor else empty) for at, cell in enumerate(cells)]
            runs = groupby(shown, lambda cell: cell[1])
            found.append([Segment("".join(text for text, _ in run), style) for style, run in runs])
        return found


def _below(look: Look, x: Axis, width: int, margin: int, count: int) -> list[Row]:
    """The x axis with its marks, and its numbers."""
    if not count:
        return []
    inner = width - margin
    ticks = x.ticks(max(1, inner // 14))
    whole = [tick for tick in ticks if tick == int(tick)] or ticks
    signs: list[tuple[str, Style]] = [("─", look.faint)] * inner
    for tick in whole:
        signs[x.at(tick) // 2] = ("┬", look.faint)
    for mark in look.marks:
        if x.low <= mark.x <= x.high:
            signs[x.at(mark.x) // 2] = (mark.sign, mark.style)
    if look.cursor is not None and x.low <= look.cursor <= x.high:
        signs[x.at(look.cursor) // 2] = ("▲", look.cursor_style)
    axis = Row().add(" " * (margin - 1)).add("└", look.faint)
    for style, run in groupby(signs, lambda sign: sign[1]):
        axis.add("".join(text for text, _ in run), style)
    step = round_step(x.high - x.low, max(1, inner // 14))
    end = f"{look.unit} {tick_text(x.high, 1.0 if x.high == int(x.high) else step / 10)}"
    numbers = Row().add(" " * margin)
    for tick in whole:
        text = tick_text(tick, step)
        start = margin + max(0, min(x.at(tick) // 2 - cell_len(text) // 2, inner - cell_len(text)))
        if start >= numbers.width + (2 if numbers.width > margin else 0) and start + len(text) < width - len(end) - 1:
            numbers.to(start).add(text, look.faint)
    if numbers.width + len(end) <= width:
        numbers.to(width - len(end)).add(end, look.faint)
    return [axis, numbers][-count:]
