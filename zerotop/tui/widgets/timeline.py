"""Phase intervals as coloured strips; where the training thread waited for communication they are hatched."""

from __future__ import annotations

from collections.abc import Iterable, Reversible, Sequence
from itertools import groupby, islice
from typing import TypeVar

from rich.segment import Segment

from zerotop.format import ms_text
from zerotop.state.run import RankState
from zerotop.tui.theme import Palette
from zerotop.tui.widgets.lines import PLAIN, Row

Item = TypeVar("Item")
Span = tuple[str, int, int, int, int]  # (phase, step, micro_step, start_ns, end_ns)
Record = tuple[int, str, int, int, int, int, int]  # of a collective, as in RankState.collectives
Cell = tuple[str, int, bool]  # (phase, micro_step, whether most of it was waiting); "" where there is no phase
EMPTY: Cell = ("", 0, False)
WAITING = "╱"
LABEL = 8
TIME = 9
NEWEST = 96
"""Spans that are looked at for the newest step."""


def timeline_rows(
    spans: Iterable[Span], records: Iterable[Record], palette: Palette, width: int, height: int
) -> list[Row]:
    """The newest steps, oldest first, at most `height` lines; the length of each is to scale with the longest."""
    by_step: dict[int, list[Span]] = {}
    for span in spans:
        by_step.setdefault(span[1], []).append(span)
    newest = sorted(by_step)[-height:]
    if not newest:
        return [Row().add("no phase has ended yet", palette.style("muted"))]
    room = max(1, width - LABEL - TIME - 1)
    bounds = {step: (min(s[3] for s in by_step[step]), max(s[4] for s in by_step[step])) for step in newest}
    longest_ns = max(1, *(end - start for start, end in bounds.values()))
    kept = list(records)
    rows: list[Row] = []
    for step in newest:
        start, end = bounds[step]
        cells = lane_cells(by_step[step], kept, start, longest_ns, room)
        row = Row().cell(str(step), LABEL - 1, palette.style("muted"), right=True).gap().extend(paint(cells, palette))
        rows.append(row.gap().cell(ms_text((end - start) / 1e6), TIME, palette.style("muted"), right=True))
    return rows


def lane_cells(
    spans: Iterable[Span], records: Iterable[Record], start_ns: int, scale_ns: int, width: int
) -> list[Cell]:
    """For each of `width` cells, which stand for `scale_ns` from `start_ns` on, the phase that fills most of it."""
    cell_ns = max(1.0, scale_ns / max(1, width))
    end_ns = start_ns + scale_ns
    weights: list[dict[tuple[str, int], float]] = [{} for _ in range(width)]
    for phase, _step, micro, begin, end in spans:
        if end > start_ns and begin < end_ns:
            for cell, overlap in _overlaps(begin, end, start_ns, cell_ns, width):
                weights[cell][phase, micro] = weights[cell].get((phase, micro), 0.0) + overlap
    waiting = [0.0] * width
    for record in records:
        begin, end = record[4] - record[6] * 1000, record[4]
        if record[6] and end > start_ns and begin < end_ns:
            for cell, overlap in _overlaps(begin, end, start_ns, cell_ns, width):
                waiting[cell] += overlap
    return [
        (*max(weight, key=lambda name: weight[name]), waited > 0.5 * cell_ns) if weight else EMPTY
        for weight, waited in zip(weights, waiting, strict=True)
    ]


def _overlaps(begin: int, end: int, start_ns: int, cell_ns: float, width: int) -> Iterable[tuple[int, float]]:
    """(cell, how much of it is covered)."""
    first = max(0, int((begin - start_ns) / cell_ns))
    last = min(width - 1, int((max(begin, end - 1) - start_ns) / cell_ns))
    for cell in range(first, last + 1):
        left = start_ns + cell * cell_ns
        overlap = min(end, left + cell_ns) - max(begin, left)
        if overlap > 0:
            yield cell, overlap


def paint(cells: Sequence[Cell], palette: Palette, named: bool = True) -> list[Segment]:
    """The cells as blocks: the name of the phase and the micro-step where they fit, else the first letter; or blank."""
    found = []
    for (phase, micro, waited), run in groupby(cells):
        size = sum(1 for _ in run)
        if not phase:
            found.append(Segment(" " * size, PLAIN))
        elif waited:
            found.append(Segment(WAITING * size, palette.waiting(phase)))
        else:
            text = block_text(phase, micro, size) if named else " " * size
            found.append(Segment(text, palette.phase(phase)))
    return found


def block_text(phase: str, micro: int, size: int) -> str:
    """`forward 3`, `forward`, `F3` or `F`, whichever fits in the block."""
    for text in (f" {phase} {micro} " if micro else "", f" {phase} ", f"{phase[:1].upper()}{micro}" if micro else ""):
        if text and len(text) <= size:
            return text.center(size)
    return phase[:1].upper().center(size)


class LastSteps:
    """The newest whole step of each rank as a strip, on a scale that all ranks share. A strip is made again only when
    its rank has ended another phase, or with another scale, width or palette."""

    def __init__(self) -> None:
        self.scale_ms = 0.0
        """What the whole width of a strip stands for: the longest of the steps."""
        self._seen: dict[int, Span] = {}
        """Rank -> its newest phase when it was looked at."""
        self._spans: dict[int, list[Span]] = {}
        self._strips: dict[int, tuple[tuple[object, ...], list[Segment]]] = {}

    def look(self, ranks: Iterable[RankState]) -> None:
        """Take what the ranks have reported since."""
        longest = 0
        for rank in ranks:
            number = rank.rank
            if not rank.spans:
                self._spans[number] = []
                continue
            if self._seen.get(number) != rank.spans[-1]:
                self._seen[number], self._spans[number] = rank.spans[-1], _last_step(rank.spans)
            if of_step := self._spans[number]:
                longest = max(longest, max(span[4] for span in of_step) - min(span[3] for span in of_step))
        self.scale_ms = longest / 1e6

    def strip(self, rank: RankState, palette: Palette, width: int) -> list[Segment]:
        """The strip of a rank in `width` cells."""
        of_step = self._spans.get(rank.rank)
        if not of_step or self.scale_ms <= 0:
            return [Segment(" " * width)]
        known = rank.collectives[-1] if rank.collectives else None
        key = (self._seen[rank.rank], known, self.scale_ms, palette, width)
        made = self._strips.get(rank.rank)
        if made is None or made[0] != key:
            start = min(span[3] for span in of_step)
            records = _newest(rank.collectives)
            cells = lane_cells(of_step, records, start, int(self.scale_ms * 1e6), width)
            made = self._strips[rank.rank] = key, paint(cells, palette)
        return made[1]


def _newest(items: Reversible[Item]) -> list[Item]:
    """The NEWEST last items, in their order. An index into the middle of a deque is slow."""
    return list(islice(reversed(items), NEWEST))[::-1]


def _last_step(spans: Reversible[Span]) -> list[Span]:
    """The spans of the newest step but one: that one is complete."""
    newest = _newest(spans)
    steps = sorted({span[1] for span in newest})
    return [span for span in newest if span[1] == steps[-2]] if len(steps) >= 2 else []
