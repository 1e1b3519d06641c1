"""A data report as lines of text: its figures, a histogram of lengths, and examples with their trained tokens marked.

The command `data` and the Data screen both draw these, each in its own way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len, chop_cells

from runtime.wire.finetuning import DataReport, DataSample
from zerotop.clean import clean
from zerotop.format import MISSING, count_text, duration_text, share_text

Kind = Literal["trained", "context", "special", "trained special", "edge", "note"]
"""What a piece of an example is. `trained`: the loss counts it; `context`: it does not; `edge`: the line at which the
next document of a packed sequence begins; `note`: about the example, not part of it."""

ROLES = {"train": "training data", "evaluation": "evaluation data"}
LINE_END = "↵"
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_WORDS = re.compile(r"\n|[^\S\n]+|\S+")


@dataclass(frozen=True)
class Piece:
    """A part of a line of an example."""

    text: str
    kind: Kind


# ---- figures ---------------------------------------------------------------------------------------------------------
def packing_fill(report: DataReport) -> float | None:
    """Share of the positions of packed sequences that hold tokens; None if nothing is packed."""
    room = report.sequences * report.seq_len
    return min(1.0, report.tokens / room) if report.packed and room else None


def _short(file: str) -> str:
    """The last two parts of an absolute path; anything else as it is."""
    return "/".join(file.rsplit("/", 2)[-2:]) if file.startswith("/") else file


def facts(report: DataReport) -> list[tuple[str, str]]:
    """The figures of a report as (name, text)."""
    of_tokens = share_text(report.trained_tokens, report.tokens)
    rows = [
        ("files", ", ".join(map(_short, report.files)) or MISSING),
        ("format", report.format),
        ("trained on", f"{report.train_on}: {count_text(report.trained_tokens)} of {count_text(report.tokens)} tokens, "
         f"{of_tokens}"),
        ("samples", _samples_text(report)),
        ("sequences", _sequences_text(report)),
    ]  # fmt: skip
    if report.truncated:
        lost = f", {count_text(report.truncated_tokens)} tokens cut off" if report.truncated_tokens else ""
        rows.append(("truncated", f"{report.truncated:,} samples{lost}"))
    if report.set_aside:
        rows.append(("set aside", ", ".join(f"{count:,} {reason}" for reason, count in report.set_aside.items())))
    if report.dropped:
        rows.append(("dropped", ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())))
    if report.template:
        rows.append(("template", report.template))
    if report.seconds:
        rows.append(("prepared in", duration_text(report.seconds)))
    return rows


def title(report: DataReport) -> str:
    """What the report is on."""
    text = ROLES[report.role]
    return text if report.complete else f"{text}: first segment of a stream"


def _samples_text(report: DataReport) -> str:
    text = f"{report.samples:,} of {report.rows:,} rows"
    return text if report.complete else f"{text} in the first segment; the stream goes on"


def _sequences_text(report: DataReport) -> str:
    text = f"{report.sequences:,} of {report.seq_len:,} tokens"
    fill = packing_fill(report)
    return f"{text}, packed, {share_text(fill, 1)} full" if fill is not None else f"{text} at most, not packed"


def example_facts(sample: DataSample) -> str:
    """Where an example comes from, and how much of it is trained."""
    return f"{sample.source}: {sample.tokens:,} tokens, {share_text(sample.trained, sample.tokens)} trained"


# ---- the histogram of lengths ----------------------------------------------------------------------------------------
def histogram(lengths: Sequence[tuple[int, int]], width: int, height: int) -> list[str]:
    """A bar per bin in `height` lines of at most `width` cells: how many samples have which length.

    The last line names lengths under their bars, the first has the highest count. A bin with samples is never empty.
    """
    highest = max((count for _, count in lengths), default=0)
    margin, body = len(count_text(highest)) + 1, height - 1
    if not highest or body < 1 or width - margin < 8:
        return []
    bars = _fitted(lengths, width - margin)
    most = max(count for _, count in bars)
    top = count_text(most)
    margin = max(margin, len(top) + 1)
    each = max(1, min(6, (width - margin) // len(bars)))
    gap = 1 if each > 2 else 0
    rows = []
    for row in range(body):
        floor = (body - 1 - row) * 8
        cells = ""
        for _, count in bars:
            filled = math.ceil(count / most * body * 8) if count else 0
            cells += _EIGHTHS[max(0, min(8, filled - floor))] * (each - gap) + " " * gap
        side = top if row == 0 else "0" if row == body - 1 and body > 1 else ""
        rows.append(f"{side:>{margin - 1}}{'┤' if side else '│'}{cells}".rstrip())
    rows.append(f"{'└':>{margin}}{_edges(bars, each)}")
    return rows


def _fitted(lengths: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """The bins, with neighbours joined until each has a cell, and further while a quarter of the width is unused."""
    least = max(1, -(-len(lengths) // max(1, width)))

    def used(joined: int) -> int:
        bars = -(-len(lengths) // joined)
        return bars * min(6, width // bars)

    joined = next((k for k in range(least, least + 3) if used(k) >= 0.75 * width), least)
    groups = [lengths[at : at + joined] for at in range(0, len(lengths), joined)]
    return [(group[-1][0], sum(count for _, count in group)) for group in groups]


def _edges(bars: Sequence[tuple[int, int]], each: int) -> str:
    """The upper ends of the first, the middle and the last bin, where there is room for them."""
    width = each * len(bars)
    last = f"≤ {bars[-1][0]:,} tokens"
    if len(last) > width:
        last = f"≤ {bars[-1][0]:,}"
    line = last.rjust(width)
    for place in (0, len(bars) // 2):
        text = f"≤ {bars[place][0]:,}" if place == 0 else f"{bars[place][0]:,}"
        at = place * each
        if line[at : at + len(text) + 2].strip() == "" and at + len(text) + 2 <= width:
            line = line[:at] + text + line[at + len(text) :]
    return line


# ---- examples --------------------------------------------------------------------------------------------------------
def example_lines(sample: DataSample, width: int) -> list[list[Piece]]:
    """The example in lines of at most `width` cells, broken at its line ends and between words."""
    lines: list[list[Piece]] = [[]]
    used = 0

    def new_line() -> None:
        nonlocal used
        lines.append([])
        used = 0

    def put(text: str, kind: Kind) -> None:
        nonlocal used
        for part in _parts(text, width):
            size = cell_len(part)
            if used and used + size > width:
                new_line()
            lines[-1].append(Piece(part, kind))
            used += size

    for number, run in enumerate(sample.runs):
        if run.edge and number:
            if lines[-1]:
                new_line()
            put(" next document ".center(min(width, 48), "╌"), "edge")
            new_line()
        if run.special:
            put(clean(run.text).replace("\n", LINE_END), "trained special" if run.trained else "special")
            continue
        kind: Kind = "trained" if run.trained else "context"
        for word in _WORDS.findall(clean(run.text)):
            if word == "\n":
                put(LINE_END, kind)
                new_line()
            else:
                put(word, kind)
    if not lines[-1]:
        lines.pop()
    if sample.left_out:
        lines.append([Piece(f"… {sample.left_out:,} tokens more", "note")])
    return [_joined(line) for line in lines]


def _parts(text: str, width: int) -> list[str]:
    return [text] if cell_len(text) <= width else chop_cells(text, max(2, width))


def _joined(line: Iterable[Piece]) -> list[Piece]:
    """Neighbouring pieces of one kind as one piece."""
    joined: list[Piece] = []
    for piece in line:
        if joined and joined[-1].kind == piece.kind and "special" not in piece.kind:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.kind)
        else:
            joined.append(piece)
    return joined
