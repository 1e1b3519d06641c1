"""The columns of the rank table: which of them fit, and by which it can be sorted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zerotop.format import bytes_text, count_text, ms_text
from zerotop.state.run import RankState
from zerotop.state.thresholds import is_capped, is_hot, is_idle
from zerotop.tui.panels import rank_cells as cells
from zerotop.tui.panels.rank_cells import Context, Draw, Value
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Row

ROOMY = 110
"""From this width on, bars and dots get more than the minimum."""
HISTORIES = ("util history", "step times", "power trend", "temp trend")
"""Titles of the columns with a curve, one of which always gets room before the memory does."""
HISTORY_FROM = 130
"""From this width on, each rank has a curve of its newest values, where more important columns leave room for it."""
HISTORY_LEAST, HISTORY_MOST = 12, 24
TREND = 11
"""The width of curves that do not grow."""
STRIPS_FROM = 150
"""From this width on, each rank has its last step as a strip."""


@dataclass(frozen=True)
class Column:
    """`value` is what is sorted by and what the last rows sum up, written by `write`."""

    title: str
    width: int
    """In cells; for the bar the minimum (it takes what is left)."""
    worth: int
    """Columns of the lowest worth are left out first when the line is too short."""
    draw: Draw
    right: bool = False
    gpu: bool = False
    value: Value | None = None
    write: Callable[[float], str] = str


COLUMNS = (
    Column("rank", 5, 100, cells.draw_rank_number, right=True, value=lambda context, rank, gpu: -float(rank.rank)),
    Column("device", 8, 40, cells.draw_device),
    Column("memory", 12, 90, cells.draw_memory_bar, value=cells.used_bytes, write=bytes_text),
    Column("used", 15, 80, cells.draw_used, right=True, value=cells.used_bytes, write=bytes_text),
    Column("RSS", 9, 18, cells.draw_rss, right=True, gpu=True),
    Column("pinned", 9, 19, cells.draw_pinned, right=True),
    Column("phase", 19, 95, cells.draw_phase),
    Column("last step, ╱ waiting", 24, 34, cells.draw_last_step),
    Column(
        "wait per step",
        13,
        70,
        cells.draw_wait,
        right=True,
        value=lambda context, rank, gpu: context.waits.waited_ms.get(rank.rank),
        write=ms_text,
    ),
    Column(
        "cost to others",
        15,
        35,
        cells.draw_cost,
        right=True,
        value=lambda context, rank, gpu: context.waits.caused_ms.get(rank.rank, 0.0),
        write=ms_text,
    ),
    Column("GPU alarm", 15, 75, cells.draw_concern, gpu=True),
    Column(HISTORIES[1], HISTORY_LEAST, 22, cells.draw_step_history, right=True),
    Column(
        "tokens/s",
        8,
        60,
        cells.draw_tokens,
        right=True,
        value=lambda context, rank, gpu: rank.step.tokens_per_s if rank.step is not None else None,
        write=count_text,
    ),
    Column("step", 7, 15, cells.draw_step, right=True),
    Column(HISTORIES[0], HISTORY_LEAST, 22, cells.draw_util_history, right=True, gpu=True),
    Column(
        "util",
        5,
        32,
        cells.gpu_cell(lambda gpu: cells.rounded(gpu.utilization_percent, "%"), is_idle),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.utilization_percent if gpu is not None else None,
        write=lambda value: f"{value:.0f}%",
    ),
    Column(HISTORIES[2], TREND, 21, cells.draw_power_history, right=True, gpu=True),
    Column(
        "power",
        9,
        31,
        cells.gpu_cell(cells.power_text, is_capped),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.power_w if gpu is not None else None,
        write=lambda value: f"{value:.0f} W",
    ),
    Column(HISTORIES[3], TREND, 20, cells.draw_temperature_history, right=True, gpu=True),
    Column(
        "temp",
        5,
        30,
        cells.gpu_cell(lambda gpu: cells.rounded(gpu.temperature_c, "°C"), is_hot),
        right=True,
        gpu=True,
        value=lambda context, rank, gpu: gpu.temperature_c if gpu is not None else None,
        write=lambda value: f"{value:.0f}°C",
    ),
    Column("clock", 8, 29, cells.gpu_cell(lambda gpu: cells.rounded(gpu.sm_clock_mhz, " MHz")), right=True, gpu=True),
    Column("host", 12, 10, cells.draw_host),
)
SORTS = ("rank", "cost to others", "wait per step", "memory", "tokens/s", "util", "power", "temp")
"""Titles of the columns that the table can be sorted by, in the order of the key."""
SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "med": statistics.median, "max": max}
"""Name of a row below the ranks -> what it has of each column."""


def sorts_of(view: View) -> list[str]:
    """Those of SORTS that this run has figures for."""
    there = {column.title for column in columns_for(view, 10_000, False)}
    return [title for title in SORTS if title in there]


def sorted_ranks(context: Context, numbers: Sequence[int], title: str, reverse: bool) -> list[int]:
    """The ranks in the order of a column, the largest value first (of ranks the lowest); those without come last."""
    value = next(column.value for column in COLUMNS if column.title == title)
    assert value is not None
    state = context.view.state
    known: list[tuple[float, int]] = []
    unknown: list[int] = []
    for number in numbers:
        rank = state.ranks.get(number) or RankState(number)
        found = value(context, rank, context.view.gpu_of(rank))
        if found is None:
            unknown.append(number)
        else:
            known.append((found, number))
    known.sort(key=lambda one: (one[0] if reverse else -one[0], one[1]))
    return [number for _, number in known] + unknown


def summary_rows(
    context: Context, numbers: Sequence[int], columns: Sequence[Column], sizes: Sequence[int], names: Sequence[str]
) -> list[Row]:
    """A row for each of `names`, keys of SUMMARIES, with that of each column that has figures."""
    view, muted = context.view, context.view.palette.style("muted")
    ranks = [view.state.ranks.get(number) or RankState(number) for number in numbers]
    rows = [Row() for _ in names]
    for column, size in zip(columns, sizes, strict=True):
        start, known = rows[0].width, []
        if column.value is not None and column.title not in ("rank", "memory"):
            values = (column.value(context, rank, view.gpu_of(rank)) for rank in ranks)
            known = [value for value in values if value is not None]
        for row, name in zip(rows, names, strict=True):
            text = name if column.title == "rank" else column.write(SUMMARIES[name](known)) if known else ""
            row.cell(text, size, muted, right=column.right).to(start + size + 1)
    return rows


def columns_for(view: View, width: int, concerned: bool) -> list[Column]:
    """The columns that fit, in their order; the least important ones are left out first. Widths depend on what this
    run can show at all."""
    ranks = view.state.ranks.values()
    on_gpu = any(rank.memory is not None and rank.memory.allocated_bytes is not None for rank in ranks)
    many_micro = any(rank.heartbeat is not None and rank.heartbeat.micro_steps > 4 for rank in ranks)
    hosts = {rank.hello.host for rank in ranks if rank.hello}
    columns: list[Column] = []
    for column in COLUMNS:
        if (column.gpu and not on_gpu) or (column.title == "host" and len(hosts) < 2):
            continue
        if column.title == "GPU alarm" and not concerned:
            continue
        if column.title in HISTORIES and (width < HISTORY_FROM or on_gpu != column.gpu):
            continue
        if column.title == "memory" and width >= ROOMY:
            column = _resized(column, 20)
        if column.title == "used":
            column = _resized(column, 9 if not on_gpu else 20 if width >= STRIPS_FROM else 15)
        if column.title == "last step, ╱ waiting" and (width < STRIPS_FROM or not any(rank.spans for rank in ranks)):
            continue
        if column.title == "phase" and many_micro and width >= ROOMY:
            column = _resized(column, 26)
        columns.append(column)
    while len(columns) > 1 and sum(column.width + 1 for column in columns) > width:
        columns.remove(min(columns, key=lambda column: column.worth))
    return _with_long_history(columns, width)


def _with_long_history(columns: list[Column], width: int) -> list[Column]:
    """The first curve of newest values grows before the bar of the memory does."""
    left = width - sum(column.width + 1 for column in columns)
    return [
        replace(column, width=column.width + min(left, HISTORY_MOST - column.width))
        if column.title in HISTORIES[:2] and left > 0
        else column
        for column in columns
    ]


def _resized(column: Column, width: int) -> Column:
    return replace(column, width=width)
