"""The node of the ranks: RAM, the part of it that the ranks hold, pinned memory, CPU."""

from __future__ import annotations

from rich.style import Style

from runtime.wire.node import NodeStats
from zerotop.format import MISSING, bytes_text, used_of
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import meter
from zerotop.tui.widgets.lines import PLAIN, Panel, Row

ROWS_LEAST = 4
"""RAM, the ranks' part of it, pinned, CPU: with fewer, everything goes into one line."""


PRESSURE_SHOWN = 1.0
"""Share of the time, in percent, in which processes wait for memory, from which it is shown."""


class HostPanel(Panel, can_focus=True):
    """One block per node, as many as fit; one line per node where there is no room for blocks."""

    READS = ("node",)

    def inputs(self, view: View) -> object:
        ranks = view.state.ranks.values()
        return super().inputs(view), sum(rank.memory.pinned_bytes for rank in ranks if rank.memory is not None)

    def accept(self, view: View) -> None:
        nodes = view.state.nodes
        title = f"host {next(iter(nodes))}" if len(nodes) == 1 else f"hosts ({len(nodes)})" if nodes else "host"
        self.entitle(title)

    def natural_height(self, width: int) -> int:
        return 7

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        nodes = [node for _, node in sorted(view.state.nodes.items())]
        if not nodes:
            return [
                Row().add(
                    "waiting for the probe" if height > 1 else " host: waiting for the probe",
                    view.palette.style("muted"),
                )
            ]
        if height < ROWS_LEAST:
            return [_line(view, node, width) for node in nodes[:height]]
        rows: list[Row] = []
        for node in nodes:
            block = _block(view, node, width, named=len(nodes) > 1)
            if rows and len(rows) + len(block) > height:
                break
            rows += block
        return rows[:height]


def _pinned_bytes(view: View, node: NodeStats) -> int:
    ranks = view.state.ranks.values()
    here = [
        rank for rank in ranks if rank.memory is not None and rank.hello is not None and rank.hello.host == node.host
    ]
    return sum(rank.memory.pinned_bytes for rank in here if rank.memory is not None)


def _gpu_note(view: View, node: NodeStats) -> str:
    if node.gpus:
        names = sorted({gpu.name for gpu in node.gpus})
        return f"{len(node.gpus)} × {names[0]}" if len(names) == 1 else f"{len(node.gpus)} GPUs"
    hello = view.state.hello
    if hello is not None and hello.device == "cpu":
        return "no GPU: CPU run"
    return f"{MISSING}{': ' + node.gpu_note if node.gpu_note else ''}"


def _shared(node: NodeStats) -> list[tuple[str, str]]:
    """What the node's memory is used for beside processes."""
    figures = (("cache", node.page_cache_bytes), ("shared", node.shared_memory_bytes))
    return [(label, bytes_text(count)) for label, count in figures if count is not None]


def _shortage(node: NodeStats) -> list[tuple[str, str]]:
    """Signs that the node's memory runs short."""
    found = []
    if node.memory_pressure_percent is not None and node.memory_pressure_percent >= PRESSURE_SHOWN:
        found.append(("waiting", f"{node.memory_pressure_percent:.0f}%"))
    if node.swap_used_bytes:
        found.append(("swap", bytes_text(node.swap_used_bytes)))
    for label, rate in (("in", node.swap_in_bytes_per_s), ("out", node.swap_out_bytes_per_s)):
        if rate:
            found.append((label, f"{bytes_text(rate)}/s"))
    return found


def _facts(facts: list[tuple[str, str]], width: int, muted: Style, text: Style) -> Row:
    """Labels and values in one line, as many as fit."""
    row = Row()
    for label, value in facts:
        size = 8 if not row.width else len(label) + 1
        if row.width + size + len(value) <= width:
            row.cell(label, size, muted).add(value, text).gap(2)
    return row


def _line(view: View, node: NodeStats, width: int) -> Row:
    palette, muted = view.palette, view.palette.style("muted")
    share = node.ram_used_bytes / node.ram_total_bytes if node.ram_total_bytes else 0.0
    row = Row().gap().add("RAM ", muted)
    row.extend(meter(share, 10, palette.style("warning" if share > 0.9 else "primary"), palette.style("border")))
    row.gap().add(used_of(node.ram_used_bytes, node.ram_total_bytes))
    for label, value in (
        ("ranks", bytes_text(sum(node.rank_rss_bytes.values()))),
        ("CPU", f"{node.cpu_percent:.0f}%"),
        ("pinned", bytes_text(_pinned_bytes(view, node))),
        ("GPU", _gpu_note(view, node)),
    ):
        if row.width + len(label) + len(value) + 4 <= width:
            row.add(f"  {label} ", muted).add(value)
    return row


def _block(view: View, node: NodeStats, width: int, named: bool) -> list[Row]:
    palette = view.palette
    muted, text = palette.style("muted"), (palette.style("muted") if view.stale else PLAIN)
    rows = [Row().add(node.host, palette.style("primary"))] if named else []
    figures = used_of(node.ram_used_bytes, node.ram_total_bytes)
    size = max(4, width - 8 - len(figures) - 2)

    def measured(label: str, share: float, value: str) -> Row:
        fill = palette.style("warning" if share > 0.9 else "primary")
        return (
            Row()
            .cell(label, 8, muted)
            .extend(meter(share, size, fill, palette.style("border")))
            .gap()
            .cell(value, width - 9 - size, text, right=True)
        )

    total = node.ram_total_bytes or 1
    ranks = sum(node.rank_rss_bytes.values())
    pinned = _pinned_bytes(view, node)
    rows.append(measured("RAM", node.ram_used_bytes / total, figures))
    rows.append(measured("ranks", ranks / total, bytes_text(ranks)))
    if shortage := _shortage(node):  # before what may not fit
        rows.append(_facts(shortage, width, muted, palette.style("warning")))
    rows.append(measured("pinned", pinned / total, bytes_text(pinned)))
    rows.append(measured("CPU", node.cpu_percent / 100, f"{node.cpu_percent:.0f}% of {node.cpu_count}"))
    facts = [("load", f"{node.load_1m:.1f}")]
    if node.run_rss_bytes:
        facts.append(("run", bytes_text(node.run_rss_bytes)))
    rows.append(_facts(facts, width, muted, text))
    rows.append(_facts(_shared(node), width, muted, text))
    rows.append(Row().cell("GPU", 8, muted).add(_gpu_note(view, node)[: max(0, width - 8)], text))
    return rows
