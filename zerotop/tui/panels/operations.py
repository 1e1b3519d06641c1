"""The kinds of collectives of the run: bytes, time, the exposed part of it, and bus bandwidth."""

from __future__ import annotations

from zerotop.format import MISSING, byte_rate_text, bytes_text, digits_text, ms_text, share_text
from zerotop.state.operations import Operation, operations
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import meter
from zerotop.tui.widgets.lines import PLAIN, Row, ScrollPanel

COLUMNS = (
    ("operation", 16, 100),
    ("bytes", 9, 95),
    ("per step", 8, 60),
    ("time", 9, 90),
    ("exposed", 9, 92),
    ("exposed per step", 22, 80),
    ("skew", 9, 50),
    ("bus bandwidth", 13, 85),
    ("best", 12, 40),
    ("of best", 7, 45),
)
"""(title, cells, worth): those of least worth are left out first."""


class OperationTable(ScrollPanel):
    """One line per operation and size, the one that costs most first."""

    READS = ("collectives", "step", "time_report")

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._kinds: list[Operation] = []
        self._key: object = None

    def accept(self, view: View) -> None:
        meetings = view.state.waits.meetings
        counted = tuple(rank.counted_step for rank in view.state.ranks.values())  # of watched trainers
        key = (meetings[-1].seq if meetings else None, len(meetings), view.state.time_report, counted)
        if key != self._key:
            self._key = key
            self._kinds = operations(view.state)
            self.have_lines(len(self._kinds) + 1)
        step_ms = view.state.waits.window().step_ms
        exposed = sum(one.exposed_per_step_ms for one in self._kinds)
        share = f" · {ms_text(exposed)} of a step exposed, {share_text(exposed, step_ms)}" if step_ms else ""
        self.entitle(f"collectives by operation{share}")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted, plain = view.palette.style("muted"), (view.palette.style("muted") if view.stale else PLAIN)
        if not self._kinds:
            text = (
                "one rank: nothing to communicate" if view.state.world_size == 1 else "no collective of all ranks yet"
            )
            return [Row().add(text, muted)]
        columns = list(COLUMNS)
        while sum(size + 1 for _, size, _ in columns) > width and len(columns) > 2:
            columns.remove(min(columns, key=lambda column: column[2]))
        head = Row()
        for title, size, _ in columns:
            head.cell(title, size, muted, right=title not in {"operation", "exposed per step"}).gap()
        rows = [head]
        step_ms = view.state.waits.window().step_ms
        first = self.scroll_offset.y
        for one in self._kinds[first : first + height - 1]:
            row = Row()
            for title, size, _ in columns:
                if title == "exposed per step":
                    share = one.exposed_per_step_ms / step_ms if step_ms else 0.0
                    fill = view.palette.style("warning" if share >= 0.1 else "primary")
                    row.extend(meter(share, size - 10, fill, view.palette.style("border")))
                    row.cell(ms_text(one.exposed_per_step_ms), 10, plain, right=True).gap()
                    continue
                row.cell(_cell(one, title), size, plain, right=title != "operation").gap()
            rows.append(row)
        return rows


def _cell(one: Operation, title: str) -> str:
    rate, best = one.bus_bytes_per_s, one.best_bus_bytes_per_s
    return {
        "operation": one.op,
        "bytes": bytes_text(one.bytes),
        "per step": digits_text(one.per_step) if one.per_step else MISSING,
        "time": ms_text(one.transfer_ms),
        "exposed": ms_text(one.exposed_ms),
        "skew": ms_text(one.skew_ms),
        "bus bandwidth": byte_rate_text(rate),
        "best": byte_rate_text(best),
        "of best": share_text(rate, best) if rate and best else MISSING,
    }[title]
