"""The selected rank's memory by category, which is also the legend of the bars in the rank table."""

from __future__ import annotations

from zerotop.format import bytes_text, share_text, used_of
from zerotop.state.memory import DERIVED_CATEGORIES, category_label, memory_use
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import category_letter
from zerotop.tui.widgets.lines import PLAIN, Panel, Row


class MemoryPanel(Panel, can_focus=True):
    """The memory of one rank by category, in figures."""

    rank = 0
    parts_shown = 0

    def accept(self, view: View) -> None:
        super().accept(view)
        state = view.state.ranks.get(self.rank)
        title = f"4 memory of rank {self.rank}"
        if state is not None and state.memory is not None:
            use = memory_use(state.memory)
            title += f" · {used_of(use.used_bytes, use.total_bytes)}"
            shown = len(use.parts) + (len(use.offloaded) + 1 if use.offloaded else 0)
            if shown != self.parts_shown:
                self.parts_shown = shown
                self.refresh(layout=True)
        self.entitle(title)

    def natural_height(self, width: int) -> int:
        return max(1, self.parts_shown) + 1

    @property
    def rows_wanted(self) -> int:
        """Lines for every category, the note and the borders."""
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
        if len(rows) < height:
            rows.append(Row().gap(4).add("~ derived, not counted", muted))
        return rows


SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim",
    "communication": "comm",
    "snapshot": "ckpt",
    "activations": "activ",
}


class Legend(Panel):
    """The letters and names of the bars in one line, for screens too small for the memory panel."""

    ALLOW_MAXIMIZE = False

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        names: list[str] = []
        for rank in view.state.ranks.values():
            for name, _ in memory_use(rank.memory).parts if rank.memory else ():
                if name not in names:
                    names.append(name)
        row = Row().gap()
        spelled = sum(len(category_label(name)) + 3 for name in names) + 1 <= width
        for name in names:
            word = category_label(name) if spelled else SHORT.get(name, name)
            if row.width + len(word) + 3 > width:
                break
            row.add(category_letter(name), view.palette.category(name)).gap().add(
                word, view.palette.style("muted")
            ).gap()
        return [row]
