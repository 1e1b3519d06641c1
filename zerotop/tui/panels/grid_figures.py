"""What a cell of the grid of the ranks can show: a figure, how far it is from calm, and the few characters for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from runtime.wire.node import GpuStats
from zerotop.format import bytes_text, count_text, ms_text
from zerotop.state.run import RankState
from zerotop.state.thresholds import (
    AT_CAP,
    COOL_C,
    COSTS_MUCH,
    FULL,
    HOT_MARGIN_C,
    IDLE_PERCENT,
    WAITS_LONG,
    hottest_c,
)
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import RARE

WARM = 0.75
"""The heat from which a figure has the colour of a warning; 1.0 is that of an error."""
UNIFORM = 0.5
"""The heat of the largest rank where there is no limit that it could come near to."""


class Cell(NamedTuple):
    """A rank's figure. `text` has at most three characters, in the unit that the figure's title names."""

    value: float
    heat: float
    text: str


@dataclass(frozen=True)
class GridFigure:
    """`read` finds the cells of the ranks that have the figure. `worst` is what the rank with the most heat is called.
    `low`: of equally hot ranks the one with the lowest value is the worst."""

    title: str
    short: str
    worst: str
    read: Callable[[View], dict[int, Cell]]
    write: Callable[[float], str]
    reads: tuple[str, ...]
    """Kinds of messages that it depends on, beside those of RARE."""
    low: bool = False

    def worst_of(self, cells: Mapping[int, Cell]) -> int | None:
        """The rank that is the worst of these; None if there is none."""
        if not cells:
            return None
        sign = -1.0 if self.low else 1.0
        return max(cells, key=lambda rank: (cells[rank].heat, sign * cells[rank].value, -rank))


def heat_of(value: float, calm: float, warm: float, hot: float) -> float:
    """0 at `calm`, WARM at `warm` and 1 at `hot`, in between to scale. `calm` may be the highest of them."""
    if calm > hot:
        value, calm, warm, hot = -value, -calm, -warm, -hot
    if value <= warm:
        return WARM * max(0.0, value - calm) / (warm - calm)
    return min(1.0, WARM + (1 - WARM) * (value - warm) / (hot - warm))


class FigureReader:
    """Reads the figures of a run; each again only after messages that it depends on, since heartbeats come all the
    time."""

    def __init__(self) -> None:
        self._known: dict[GridFigure, tuple[tuple[int, ...], dict[int, Cell]]] = {}

    def read(self, view: View) -> dict[GridFigure, dict[int, Cell]]:
        """Each figure that this run has, in the order of the key, with its cells by rank; that of the memory always."""
        ranks = view.state.ranks.values()
        on_gpu = any(rank.memory is not None and rank.memory.allocated_bytes is not None for rank in ranks)
        memory = VRAM if on_gpu else RSS
        others = (*((UTILISATION, TEMPERATURE, POWER) if on_gpu else ()), COST, WAIT, STEP_TIME, TOKENS)
        read = {figure: self._cells(view, figure) for figure in (memory, *others)}
        return {figure: cells for figure, cells in read.items() if cells or figure is memory}

    def _cells(self, view: View, figure: GridFigure) -> dict[int, Cell]:
        revision = view.state.revision((*figure.reads, *RARE))
        known = self._known.get(figure)
        if known is None or known[0] != revision:
            known = self._known[figure] = (revision, figure.read(view))
        return known[1]


def _number(share: float) -> str:
    return f"{min(999.0, 100 * share):.0f}"


# ---- memory ----------------------------------------------------------------------------------------------------------
def _vram(view: View) -> dict[int, Cell]:
    found = {}
    for number, use in view.memory_uses.items():
        if use.on_gpu and use.total_bytes:
            share = use.used_bytes / use.total_bytes
            found[number] = Cell(share, heat_of(share, 0.0, FULL, 1.0), _number(share))
    return found


def _rss(view: View) -> dict[int, Cell]:
    largest = max((use.used_bytes for use in view.memory_uses.values()), default=0)
    return {
        number: Cell(use.used_bytes, UNIFORM * use.used_bytes / largest, _number(use.used_bytes / largest))
        for number, use in view.memory_uses.items()
        if largest
    }


# ---- the GPU ---------------------------------------------------------------------------------------------------------
def _of_gpus(view: View, make: Callable[[GpuStats], Cell | None]) -> dict[int, Cell]:
    found = {}
    for number, rank in view.state.ranks.items():
        gpu = view.gpu_of(rank)
        cell = make(gpu) if gpu is not None else None
        if cell is not None:
            found[number] = cell
    return found


def _utilisation(gpu: GpuStats) -> Cell | None:
    percent = gpu.utilization_percent
    return None if percent is None else Cell(percent, heat_of(percent, 100.0, IDLE_PERCENT, 0.0), f"{percent:.0f}")


def _temperature(gpu: GpuStats) -> Cell | None:
    now = gpu.temperature_c
    limit = hottest_c(gpu)
    return None if now is None else Cell(now, heat_of(now, COOL_C, limit - HOT_MARGIN_C, limit), f"{now:.0f}")


def _power(gpu: GpuStats) -> Cell | None:
    if gpu.power_w is None or not gpu.power_limit_w:
        return None
    share = gpu.power_w / gpu.power_limit_w
    # At its limit a GPU works as it should, only slower: that is never as bad as an error.
    return Cell(gpu.power_w, min(heat_of(share, 0.0, AT_CAP, 2.0), WARM), _number(share))


# ---- the steps -------------------------------------------------------------------------------------------------------
def _shares(times_ms: Mapping[int, float], step_ms: float, much: float) -> dict[int, Cell]:
    found = {}
    for number, time_ms in times_ms.items():
        share = min(1.0, time_ms / step_ms) if step_ms else 0.0
        found[number] = Cell(time_ms, heat_of(share, 0.0, much, 3 * much), _number(share))
    return found


def _cost(view: View) -> dict[int, Cell]:
    waits = view.state.waits.window()
    return _shares({rank: waits.caused_ms.get(rank, 0.0) for rank in waits.waited_ms}, waits.step_ms, COSTS_MUCH)


def _wait(view: View) -> dict[int, Cell]:
    waits = view.state.waits.window()
    return _shares(waits.waited_ms, waits.step_ms, WAITS_LONG)


def _against_median(
    view: View, value_of: Callable[[RankState], float | None], slower: Callable[[float, float], float]
) -> dict[int, Cell]:
    read = {number: value_of(rank) for number, rank in view.state.ranks.items()}
    values = {number: value for number, value in read.items() if value is not None}
    middle = statistics.median(values.values()) if values else 0.0
    found = {}
    for number, value in values.items():
        by = slower(value, middle) if middle else 0.0
        text = f"{max(-99.0, min(999.0, 100 * (value / middle - 1) if middle else 0.0)):.0f}".replace("-0", "0")
        found[number] = Cell(value, heat_of(by, 0.0, COSTS_MUCH, 3 * COSTS_MUCH), text)
    return found


def _step_ms(rank: RankState) -> float | None:
    return rank.step.step_ms if rank.step is not None else None


def _tokens(rank: RankState) -> float | None:
    return rank.step.tokens_per_s if rank.step is not None else None


VRAM = GridFigure("VRAM, % of the device", "VRAM", "fullest", _vram, lambda value: f"{value:.0%}", ("memory",))
RSS = GridFigure("RSS, % of the largest", "RSS", "largest", _rss, bytes_text, ("memory",))
UTILISATION = GridFigure(
    "utilisation, %",
    "util",
    "lowest",
    lambda view: _of_gpus(view, _utilisation),
    lambda value: f"{value:.0f}%",
    ("node",),
    True,
)
TEMPERATURE = GridFigure(
    "temperature, °C",
    "temp",
    "hottest",
    lambda view: _of_gpus(view, _temperature),
    lambda value: f"{value:.0f}°C",
    ("node",),
)
POWER = GridFigure(
    "power, % of the limit",
    "power",
    "most",
    lambda view: _of_gpus(view, _power),
    lambda value: f"{value:.0f} W",
    ("node",),
)
COST = GridFigure("cost to others, % of a step", "cost", "costliest", _cost, ms_text, ("step", "collectives"))
WAIT = GridFigure("waiting, % of a step", "wait", "longest", _wait, ms_text, ("step", "collectives"))
STEP_TIME = GridFigure(
    "step time, % off the median",
    "step",
    "slowest",
    lambda view: _against_median(view, _step_ms, lambda value, middle: value / middle - 1),
    ms_text,
    ("step",),
)
TOKENS = GridFigure(
    "tokens/s, % off the median",
    "tokens/s",
    "slowest",
    lambda view: _against_median(view, _tokens, lambda value, middle: 1 - value / middle),
    count_text,
    ("step",),
    True,
)
