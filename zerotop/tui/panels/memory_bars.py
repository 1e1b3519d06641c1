"""A bar for the memory of every rank and of every host, from zero to its limit, with the peak and the plan on it."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType

from runtime.wire.node import NodeStats
from zerotop.format import bytes_text, share_text, used_of
from zerotop.state.memory import MemoryUse, planned_peak
from zerotop.state.run import RankState
from zerotop.state.thresholds import FULL
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.view import View
from zerotop.tui.widgets.bar import split_cells, stacked_bar
from zerotop.tui.widgets.lines import PLAIN, Row

NAME, USED = 15, 23
NOTES_FROM = 120
NOTES = 38
PEAK, PLAN = "┃", "◇"


class MemoryBars(RankPanel):
    """Hosts first, then ranks. Those of GPUs are to the scale of the largest GPU; those of CPU ranks, which share the
    host's memory, to that of the largest rank."""

    READS = ("memory", "node")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "select(-1)", "Previous rank", show=False),
        Binding("down", "select(1)", "Next rank", show=False),
        Binding("k", "select(-1)", show=False),
        Binding("j", "select(1)", show=False),
        Binding("enter", "open", "Open rank", show=False),
    ]

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.selected = 0
        self._count = 0
        self._hosts = 0

    @property
    def rows_wanted(self) -> int:
        """Lines for all hosts, all ranks, the scale and the borders."""
        return self._hosts + max(1, self._count) + 1 + self.gutter.height

    def notice(self, view: View) -> None:
        self._count = max(max(view.state.ranks, default=-1) + 1, view.state.world_size)
        self._hosts = len(view.state.nodes)

    def accept(self, view: View) -> None:
        self.have_lines(self._hosts + self._count + 1)
        self.entitle(f"memory by use · {PEAK} peak  {PLAN} planned peak  · free")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        uses = view.memory_uses
        if not uses and not view.state.nodes:
            return [Row().add("no data yet", muted)]
        scale = self._scale(view, uses)
        notes = NOTES if width >= NOTES_FROM else 0
        bar = max(8, width - NAME - USED - 2 - notes)
        nodes = [node for _, node in sorted(view.state.nodes.items())]
        lines: list[Row] = []
        first, last = self.scroll_offset.y, self.scroll_offset.y + height - 1
        for at in range(first, min(last, self._hosts + self._count)):
            if at < self._hosts:
                lines.append(self._host(view, nodes[at], bar, notes))
            else:
                lines.append(self._rank(view, at - self._hosts, uses, scale, bar, notes))
        lines += [Row() for _ in range(height - 1 - len(lines))]
        return [*lines, _ruler(view, scale, bar)]

    def _scale(self, view: View, uses: dict[int, MemoryUse]) -> int:
        """What the whole width of a rank's bar stands for."""
        on_gpu = [use.total_bytes for use in uses.values() if use.on_gpu]
        if on_gpu:
            return max(on_gpu)
        peaks = [max(rank.memory.peak_bytes.values(), default=0) for rank in view.state.ranks.values() if rank.memory]
        plans = [_plan(rank) or 0 for rank in view.state.ranks.values()]
        return max([use.used_bytes for use in uses.values()] + peaks + plans, default=0)

    def _rank(self, view: View, number: int, uses: dict[int, MemoryUse], scale: int, bar: int, notes: int) -> Row:
        palette, muted = view.palette, view.palette.style("muted")
        rank = view.state.ranks.get(number) or RankState(number)
        chosen = number == self.selected
        row = Row().add("▌" if chosen else " ", palette.style("primary" if self.has_focus else "muted"))
        device = rank.hello.device if rank.hello is not None else ""
        row.cell(f"{number:>3} {device}", NAME - 2, Style(bold=chosen)).gap()
        use = uses.get(number)
        if use is None or rank.memory is None:
            return row.add("no data yet", muted)
        parts = [(name, count, palette.category(name)) for name, count in use.parts]
        limit = use.total_bytes if use.on_gpu else scale
        inside = max(1, round(bar * limit / scale)) if scale else bar
        cells = stacked_bar(parts, limit, inside, palette.style("border"))
        peak = max((size for phase, size in rank.memory.peak_bytes.items() if phase != "init"), default=0)
        plan = _plan(rank) or 0
        if use.on_gpu:  # peaks are of torch's tensors; what the driver holds beyond them comes on top
            beyond = max(0, use.used_bytes - (rank.memory.allocated_bytes or 0))
            peak, plan = (peak + beyond if peak else 0), (plan + beyond if plan else 0)
        for size, sign in ((plan, PLAN), (peak, PEAK)):
            if size:
                cells = _with_sign(cells, min(inside - 1, int(size * inside / max(1, limit))), sign)
        row.extend(cells).gap(bar - inside + 1)
        share = use.used_bytes / max(1, use.total_bytes)
        style = palette.style("warning", bold=True) if use.on_gpu and share >= FULL else muted if view.stale else PLAIN
        text = f"{used_of(use.used_bytes, use.total_bytes)} {share:>4.0%}" if use.on_gpu else bytes_text(use.used_bytes)
        row.cell(text, USED, style, right=True)
        if notes:
            row.gap(2).cell(_peak_note(rank), notes - 2, muted)
        return row

    def _host(self, view: View, node: NodeStats, bar: int, notes: int) -> Row:
        """What the ranks, everything else, and the page cache take of the host's RAM."""
        palette, muted = view.palette, view.palette.style("muted")
        row = Row().gap().cell(node.host, NAME - 2, palette.style("primary")).gap()
        ranks = sum(node.rank_rss_bytes.values())
        pinned = sum(
            rank.memory.pinned_bytes
            for rank in view.state.ranks.values()
            if rank.memory is not None and rank.hello is not None and rank.hello.host == node.host
        )
        pinned = min(pinned, ranks)
        others = max(0, node.ram_used_bytes - ranks)
        cache = min(node.page_cache_bytes or 0, max(0, node.ram_total_bytes - node.ram_used_bytes))
        parts = [
            ("ranks", ranks - pinned, palette.category("parameters")),
            ("pinned", pinned, palette.category("masters")),
            ("others", others, palette.category("other")),
            ("file cache", cache, palette.category("cache")),
        ]
        cells = split_cells([count for _, count, _ in parts], node.ram_total_bytes, bar)
        for (name, _, style), size in zip(parts, cells, strict=True):
            text = name if size >= len(name) + 2 else name[0]
            row.add(text.center(size)[:size] if size else "", style)
        row.add("·" * (bar - sum(cells)), palette.style("border")).gap()
        share = node.ram_used_bytes / max(1, node.ram_total_bytes)
        full = palette.style("warning", bold=True) if share >= FULL else muted if view.stale else PLAIN
        row.cell(f"{used_of(node.ram_used_bytes, node.ram_total_bytes)} {share:>4.0%}", USED, full, right=True)
        if notes:
            limit = f", limit {bytes_text(node.cgroup_limit_bytes)}" if node.cgroup_limit_bytes else ""
            row.gap(2).cell(f"pinned {bytes_text(pinned)}{limit}", notes - 2, muted)
        return row

    # ---- keys and mouse --------------------------------------------------------------------------------------------
    def action_select(self, by: int) -> None:
        """Select another rank."""
        self.select_rank(self.selected + by)

    def select_rank(self, number: int) -> None:
        self.selected = max(0, min(self._count - 1, number))
        self.scroll_line_into_view(self._hosts + self.selected, self.scrollable_content_region.height - 1)
        self.tell_selected()

    def rank_at(self, column: int, line: int) -> int | None:
        number = self.scroll_offset.y + line - self._hosts
        return number if 0 <= number < self._count else None


def _plan(rank: RankState) -> int | None:
    plan = rank.hello.planned if rank.hello is not None else None
    return planned_peak(rank.memory, plan) if rank.memory is not None else None


def _peak_note(rank: RankState) -> str:
    peaks = {phase: size for phase, size in rank.memory.peak_bytes.items() if phase != "init"} if rank.memory else {}
    if not peaks:
        return "no peak yet"
    phase = max(peaks, key=peaks.__getitem__)
    text = f"peak {bytes_text(peaks[phase])} in {phase}"
    planned = _plan(rank)
    return text + (f", {share_text(peaks[phase], planned)} of plan" if planned else "")


def _with_sign(cells: list[Segment], place: int, sign: str) -> list[Segment]:
    """The bar with a sign in one of its cells; it keeps the colour behind it."""
    found: list[Segment] = []
    start = 0
    for text, style, _ in cells:
        end = start + len(text)
        if start <= place < end:
            at = place - start
            found += [Segment(text[:at], style), Segment(sign, style), Segment(text[at + 1 :], style)]
        else:
            found.append(Segment(text, style))
        start = end
    return [segment for segment in found if segment.text]


def _ruler(view: View, scale: int, bar: int) -> Row:
    """Zero, half and the limit under the bars of the ranks."""
    muted = view.palette.style("muted")
    middle, end = bytes_text(scale / 2), bytes_text(scale)
    row = Row().gap(NAME).add("0", muted)
    if bar >= 30:
        row.to(NAME + bar // 2 - len(middle) // 2).add(middle, muted)
    return row.to(max(row.width + 1, NAME + bar - len(end))).add(end, muted)
