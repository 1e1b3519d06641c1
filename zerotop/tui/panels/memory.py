"""The selected rank's memory by category, which is also the legend of the bars in the rank table."""

from __future__ import annotations

import re
import textwrap

from zerotop.format import bytes_text, share_text, used_of
from zerotop.state.forecast import most_pressing
from zerotop.state.memory import (
    DERIVED_CATEGORIES,
    SHORT_LABELS,
    category_label,
    memory_use,
    peak_text,
    phase_peaks_text,
)
from zerotop.state.run import RankState
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import category_letter
from zerotop.tui.widgets.lines import PLAIN, Panel, Row

WIDTH = 42
"""Cells inside the panel's border on the main screen."""


class MemoryPanel(Panel, can_focus=True):
    """The memory of one rank by category, in figures."""

    READS = ("memory", "node", "step", "evaluation", "command_record")
    rank = 0
    full = False
    """Whether the peaks of every phase and the comparison with data parallelism are shown, too."""
    lines_wanted = 0

    def __init__(self, key: str = "2", *, id: str) -> None:
        super().__init__(id=id)
        self.key = key
        """The number of the screen that has more of it; empty on that screen itself."""

    def accept(self, view: View) -> None:
        state = view.state.ranks.get(self.rank)
        title = f"{self.key} memory of rank {self.rank}".strip()
        if state is not None and state.memory is not None:
            use = memory_use(state.memory)
            title += f" · {used_of(use.used_bytes, use.total_bytes)}"
            wanted = len(use.parts) + (len(use.offloaded) + 1 if use.offloaded else 0) + bool(use.untouched_bytes) + 1
            wanted += len(self._notes(view, state))
            if wanted != self.lines_wanted:
                self.lines_wanted = wanted
                self.refresh(layout=True)
        self.entitle(title)

    def natural_height(self, width: int) -> int:
        return max(2, self.lines_wanted)

    @property
    def rows_wanted(self) -> int:
        """Lines for every category, the notes and the borders."""
        return self.natural_height(0) + self.gutter.height

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette = view.palette
        muted = palette.style("muted")
        state = view.state.ranks.get(self.rank)
        if state is None or state.memory is None:
            return [Row().add("no data yet", muted)]
        use = memory_use(state.memory)
        text = palette.style("muted") if view.stale else PLAIN
        rows: list[Row] = []

        def line(name: str, count: int, of: int) -> None:
            word = category_label(name) + (" ~" if name in DERIVED_CATEGORIES else "")
            row = Row().add(f" {category_letter(name)} ", palette.category(name)).gap().cell(word, 15, text)
            row.cell(bytes_text(count), 10, text, right=True)
            rows.append(row.cell(share_text(count, of), 6, muted, right=True))

        for name, count in use.parts:
            line(name, count, use.used_bytes)
        if use.offloaded:
            pinned = f", {bytes_text(use.pinned_bytes)} pinned" if use.pinned_bytes else ", not pinned"
            rows.append(Row().gap(4).add(f"in host memory: {bytes_text(use.offloaded_bytes)}{pinned}", muted))
            for name, count in use.offloaded:
                line(name, count, use.offloaded_bytes)
        if use.untouched_bytes:
            row = Row().gap(3).add(" ").cell("not written yet", 15, muted)
            rows.append(row.cell(f"-{bytes_text(use.untouched_bytes)}", 10, muted, right=True))
        notes = self._notes(view, state)
        if len(rows) + len(notes) < height:
            rows.append(Row().gap(4).add("~ derived, not counted", muted))
        return rows + notes

    def _notes(self, view: View, state: RankState) -> list[Row]:
        """The peak beside the plan's figure, and the next peak of the run."""
        memory, plan = state.memory, state.hello.planned if state.hello is not None else None
        if memory is None:
            return []
        muted, width = view.palette.style("muted"), max(20, (self.content_size.width or WIDTH) - 1)
        texts = [(peak_text(memory, plan), PLAIN if not view.stale else muted)]
        if self.full:
            texts.append((phase_peaks_text(memory), muted))
            texts.append((plan.comparison if plan is not None else "", muted))
        need = most_pressing(view.state)
        if need is not None:
            texts.append((f"next: {need.brief}", view.palette.style("warning") if need.short else muted))
        return [Row().gap().add(line, style) for text, style in texts for line in _wrapped(text, width)]


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of `text`, with no byte count apart from its unit."""
    kept_together = re.sub(r"(?<=\d) (?=[KMGT]?i?B\b)", "\xa0", text)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(kept_together, width)]


class Legend(Panel):
    """The letters and names of the bars in one line, for screens too small for the memory panel."""

    ALLOW_MAXIMIZE = False
    READS = ("memory",)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        names: list[str] = []
        for rank in view.state.ranks.values():
            for name, _ in memory_use(rank.memory).parts if rank.memory else ():
                if name not in names:
                    names.append(name)
        row = Row().gap()
        spelled = sum(len(category_label(name)) + 3 for name in names) + 1 <= width
        for name in names:
            word = category_label(name) if spelled else SHORT_LABELS.get(name, name)
            if row.width + len(word) + 3 > width:
                break
            row.add(category_letter(name), view.palette.category(name)).gap().add(
                word, view.palette.style("muted")
            ).gap()
        return [row]
