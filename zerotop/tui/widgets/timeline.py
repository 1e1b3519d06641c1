"""Phase intervals as coloured strips: one line per step, all lines on one time scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zerotop.format import ms_text
from zerotop.tui.theme import Palette
from zerotop.tui.widgets.lines import PLAIN, Row

Span = tuple[str, int, int, int, int]  # (phase, step, micro_step, start_ns, end_ns)
LABEL = 8
TIME = 9


def timeline_rows(spans: Iterable[Span], palette: Palette, width: int, height: int) -> list[Row]:
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
    rows: list[Row] = []
    for step in newest:
        start, end = bounds[step]
        cells = phase_cells(by_step[step], start, longest_ns, room)
        row = Row().cell(str(step), LABEL - 1, palette.style("muted"), right=True).gap()
        for phase, size in _runs(cells):
            row.add(_label(phase, size), palette.phase(phase) if phase else PLAIN)
        rows.append(row.gap().cell(ms_text((end - start) / 1e6), TIME, palette.style("muted"), right=True))
    return rows


def phase_cells(spans: Sequence[Span], start_ns: int, scale_ns: int, width: int) -> list[str]:
    """For each of `width` cells the phase that fills most of it; "" where there is none. The strip ends where the
    spans end."""
    cell_ns = scale_ns / width
    weights: list[dict[str, float]] = [{} for _ in range(width)]
    for phase, _step, _micro, begin, end in spans:
        first = int((begin - start_ns) / cell_ns)
        last = min(width - 1, int(max(begin, end - 1) - start_ns) // max(1, int(cell_ns)))
        for cell in range(max(0, first), last + 1):
            left = start_ns + cell * cell_ns
            overlap = min(end, left + cell_ns) - max(begin, left)
            if overlap > 0:
                weights[cell][phase] = weights[cell].get(phase, 0.0) + overlap
    return [max(weight, key=lambda name: weight[name]) if weight else "" for weight in weights]


def _runs(cells: Sequence[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for phase in cells:
        if runs and runs[-1][0] == phase:
            runs[-1] = (phase, runs[-1][1] + 1)
        else:
            runs.append((phase, 1))
    return runs


def _label(phase: str, size: int) -> str:
    """The name of the phase where it fits, else its first letter."""
    return phase.center(size) if phase and size >= len(phase) + 2 else phase[:1].upper().center(size)
