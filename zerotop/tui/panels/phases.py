"""The letters of the strips of the last step, in one line."""

from __future__ import annotations

from zerotop.tui.panels.rank_columns import STRIPS_FROM
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row
from zerotop.tui.widgets.timeline import WAITING

SHOWN = ("data", "forward", "backward", "reduce", "gather", "offload", "step", "checkpoint", "eval", "paused")


class PhaseLegend(Panel):
    """What the letters and colours of phases mean."""

    ALLOW_MAXIMIZE = False
    READS = ("phases",)

    def wanted(self, view: View, width: int) -> bool:
        """Whether there are strips to explain."""
        return width >= STRIPS_FROM and any(rank.spans for rank in view.state.ranks.values())

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        return [phase_legend(view, width)]


def phase_legend(view: View, width: int) -> Row:
    """The phases that the run has had, and the hatching."""
    palette, muted = view.palette, view.palette.style("muted")
    seen = {span[0] for rank in view.state.ranks.values() for span in list(rank.spans)[-64:]}
    row = Row().gap()
    for phase in SHOWN:
        if phase in seen and row.width + len(phase) + 5 <= width:
            row.add(f" {phase[:1].upper()} ", palette.phase(phase)).add(f" {phase}  ", muted)
    if row.width + 24 <= width:
        row.add(WAITING * 3, palette.waiting("reduce")).add(" waiting for others", muted)
    return row
