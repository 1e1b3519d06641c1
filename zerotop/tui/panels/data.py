"""What is trained and evaluated on: the figures of a data report, the lengths of its samples, and examples."""

from __future__ import annotations

import textwrap

from rich.style import Style

from runtime.wire.finetuning import DataReport, DataSample
from zerotop.clean import clean
from zerotop.format import share_text
from zerotop.state.material import ROLES, Kind, Piece, example_lines, facts, histogram, title
from zerotop.state.run import RunState
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row
from zerotop.tui.widgets.textlines import TextLines

NAME = 12
"""Cells of the name of a figure."""


def why_no_report(state: RunState) -> str:
    """Why there is nothing to show."""
    if state.hello is None:
        return "no data report yet: waiting for ranks to connect"
    if state.hello.steps is None:
        return "no data report: the run has a script of its own"
    if not state.series:
        return "no data report yet: none has arrived before the first step"
    return "no data report: only fine-tuning of a Hugging Face model sends one"


class DataFacts(TextLines):
    """The figures of the report of `role`, and its notes."""

    READS = ("data_report", "step")
    role = "train"

    def subject(self, view: View) -> object:
        return view.state.data.get(self.role) or why_no_report(view.state)

    def accept(self, view: View) -> None:
        others = [f" · d: {text}" for role, text in ROLES.items() if role != self.role and role in view.state.data]
        report = view.state.data.get(self.role)
        self.entitle(f"{title(report) if report is not None else ROLES[self.role]}{''.join(others)}")
        super().accept(view)

    def make_rows(self, view: View, width: int) -> list[Row]:
        muted = view.palette.style("muted")
        report = view.state.data.get(self.role)
        if report is None:
            return [Row().add(line, muted) for line in textwrap.wrap(why_no_report(view.state), width)]
        rows: list[Row] = []
        for name, text in facts(report):
            for number, line in enumerate(textwrap.wrap(clean(text), max(12, width - NAME)) or [""]):
                rows.append(Row().cell("" if number else name, NAME, muted).add(line))
        for note in report.notes:
            for number, line in enumerate(textwrap.wrap(clean(note), max(12, width - 2))):
                rows.append(Row().add("  " if number else "· ", muted).add(line))
        return rows


class LengthPanel(Panel, can_focus=True):
    """The histogram of the lengths of samples."""

    READS = ("data_report", "step")
    role = "train"

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")

    def accept(self, view: View) -> None:
        report = view.state.data.get(self.role)
        longest = f" · cut at {report.seq_len:,}" if report is not None and report.truncated else ""
        self.entitle(f"lengths{longest}")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        report = view.state.data.get(self.role)
        bars = histogram(report.lengths, width, height) if report is not None else []
        if not bars:
            return [Row().add("no lengths", view.palette.style("muted"))]
        faint, style = view.palette.style("muted"), view.palette.plot("throughput")
        rows = []
        for number, line in enumerate(bars, 1):
            side = max(line.find("┤"), line.find("│"), line.find("└")) + 1
            row = Row().add(line[:side], faint)
            rows.append(row.add(line[side:], faint if number == len(bars) else style))
        return rows


class ExamplePanel(TextLines):
    """One example: what the model sees, with the tokens that the loss counts set off."""

    READS = ("data_report", "step")
    role = "train"
    number = 0

    def example(self, state: RunState) -> DataSample | None:
        """The one that is shown."""
        report = state.data.get(self.role)
        if report is None or not report.examples:
            return None
        return report.examples[min(self.number, len(report.examples) - 1)]

    def subject(self, view: View) -> object:
        return self.example(view.state)

    def accept(self, view: View) -> None:
        self.entitle(self._heading(view.state.data.get(self.role), self.example(view.state)))
        super().accept(view)

    def _heading(self, report: DataReport | None, sample: DataSample | None) -> str:
        if report is None or sample is None:
            return "examples"
        number = min(self.number, len(report.examples) - 1) + 1
        trained = share_text(sample.trained, sample.tokens)
        return f"example {number} of {len(report.examples)} · {sample.tokens:,} tokens, {trained} trained"

    def make_rows(self, view: View, width: int) -> list[Row]:
        sample = self.example(view.state)
        if sample is None:
            report = view.state.data.get(self.role)
            text = "the report has no examples" if report is not None else why_no_report(view.state)
            return [Row().add(text, view.palette.style("muted"))]
        styles = piece_styles(view.palette)
        rows = [_legend(styles), Row().cell(sample.source, width, styles["note"]), Row()]
        for line in example_lines(sample, width):
            row = Row()
            for piece in line:
                row.add(piece.text, styles[piece.kind])
            rows.append(row)
        return rows


def piece_styles(palette: Palette) -> dict[Kind, Style]:
    """Kind of a piece -> style. What is trained is underlined as well: colours are not for everybody."""
    chip = Style(bgcolor=palette.ui["panel"])
    underlined = Style(underline=True)
    return {
        "trained": palette.style("primary") + underlined,
        "context": Style(),
        "special": palette.style("muted") + chip,
        "trained special": palette.style("primary") + chip + underlined,
        "edge": palette.style("accent"),
        "note": palette.style("muted"),
    }


def _legend(styles: dict[Kind, Style]) -> Row:
    row = Row()
    for piece, meaning in (
        (Piece("trained", "trained"), "counted by the loss"),
        (Piece("context", "context"), "seen only"),
        (Piece("<token>", "special"), "special"),
    ):
        row.add(piece.text, styles[piece.kind]).add(f" {meaning}   ", styles["note"])
    return row
