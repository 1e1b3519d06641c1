"""Data reports as text: figures, a histogram of lengths, and examples in which trained tokens are marked."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from runtime.wire.finetuning import DataReport, DataSample
from zerotop.clean import clean, clean_line
from zerotop.state.material import Kind, Piece, example_facts, example_lines, facts, histogram, title

HISTOGRAM_LINES = 7
WIDEST = 120
_STYLES: dict[Kind, tuple[str, str]] = {
    "trained": ("4;1;36", "4;1"),
    "context": ("", ""),
    "special": ("2;35", "2"),
    "trained special": ("4;35", "4;7"),
    "edge": ("33", "1"),
    "note": ("2", "2"),
}
"""Kind of a piece -> SGR parameters, with colour and without. What is trained is underlined in both."""


def render(reports: Sequence[DataReport], samples: int, *, colour: bool, styled: bool, width: int) -> str:
    """All reports with at most `samples` examples each. `styled`: mark trained tokens by underlining, else by
    brackets; `colour` adds colours."""
    paint = _Paint(colour, styled)
    return "\n\n".join(_report(report, samples, paint, width) for report in reports)


def render_for_stdout(reports: Sequence[DataReport], samples: int) -> str:
    """The same for what stdout is: a terminal or not, with colours or without, with block characters or without."""
    styled = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    width = min(WIDEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDEST
    return render(reports, samples, colour=styled and not os.environ.get("NO_COLOR"), styled=styled, width=width)


class _Paint:
    """Marks the pieces of an example."""

    def __init__(self, colour: bool, styled: bool) -> None:
        self._colour, self._styled = colour, styled

    def line(self, pieces: Sequence[Piece]) -> str:
        return "".join(self._piece(piece) for piece in pieces)

    def bold(self, text: str) -> str:
        return f"\x1b[1m{clean_line(text)}\x1b[0m" if self._styled else text

    @property
    def legend(self) -> str:
        if self._styled:
            return f"{self._piece(Piece('underlined', 'trained'))} tokens are trained, the others are context"
        return "tokens in ⟦ ⟧ are trained, the others are context"

    @property
    def widening(self) -> int:
        """Cells that the marks of a line may take."""
        return 0 if self._styled else 8

    def _piece(self, piece: Piece) -> str:
        text = clean_line(piece.text)  # what it says must not pass for our own colours
        if not self._styled:
            return f"⟦{text}⟧" if "trained" in piece.kind else text
        codes = _STYLES[piece.kind][0 if self._colour else 1]
        return f"\x1b[{codes}m{text}\x1b[0m" if codes else text


def _report(report: DataReport, samples: int, paint: _Paint, width: int) -> str:
    rows = facts(report)
    names = max(len(name) for name, _ in rows)
    lines = [paint.bold(title(report))]
    lines += [f"  {name:<{names}}  {clean(text)}" for name, text in rows]
    lines += [f"  note: {clean(note)}" for note in report.notes]
    if bars := histogram(report.lengths, width - 2, HISTOGRAM_LINES):
        lines += ["", "  tokens per sample", *(f"  {line}" for line in bars)]
    shown = report.examples[:samples]
    if shown:
        lines += ["", f"  {paint.legend}"]
    for number, sample in enumerate(shown, 1):
        lines += ["", *_example(f"example {number} of {len(report.examples)}", sample, paint, width)]
    return "\n".join(lines)


def _example(title: str, sample: DataSample, paint: _Paint, width: int) -> list[str]:
    body = example_lines(sample, max(20, width - 4 - paint.widening))
    return [f"  {paint.bold(f'{title}, {example_facts(sample)}')}", *(f"    {paint.line(line)}" for line in body)]
