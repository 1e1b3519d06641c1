"""One rank in full: its phases in the last steps, its collectives, its memory and its log."""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len
from rich.style import Style
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal

from zerotop.format import MISSING, bytes_text, count_text, digits_text, energy_text, ms_text
from zerotop.state.bandwidth import bus_factor
from zerotop.state.efficiency import rank_efficiency
from zerotop.state.gpu import concerns
from zerotop.state.gpu_text import gpu_items, missing_text
from zerotop.state.memory import gpu_of
from zerotop.state.roofline import rank_ceiling
from zerotop.state.run import RankState
from zerotop.state.waits import WINDOW_STEPS
from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.header import Header
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.panels.verdict import VerdictLine
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.keybar import KeyBar
from zerotop.tui.widgets.lines import PLAIN, Panel, Row, fit
from zerotop.tui.widgets.timeline import timeline_rows

ROOMY = 30
"""Lines of a screen on which the lines on time and ceiling take nothing from what matters more."""


class RankFacts(Panel):
    """What the rank is and what it does, in two lines, what the driver says of its GPU, in at most two more, and on a
    screen with room for them a line on where the time of a step goes, and one on MFU and the binding ceiling."""

    ALLOW_MAXIMIZE = False
    READS = ("heartbeat", "step", "memory", "phases", "collectives", "node", "time_report")
    more_lines = 0

    def __init__(self, rank: int) -> None:
        super().__init__(id="facts")
        self.rank = rank

    def accept(self, view: View) -> None:
        lines = len(self._more(view, self.size.width)) if self.size.width else 0
        if lines != self.more_lines:
            self.more_lines = lines
            self.refresh(layout=True)

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        state = view.state.ranks.get(self.rank) or RankState(self.rank)
        muted, hello, step, beat = view.palette.style("muted"), state.hello, state.step, state.heartbeat
        who = Row().gap().add(f"rank {self.rank}", view.palette.style("primary", bold=True))
        now = Row().gap()
        if hello is not None:
            device = f"{hello.device} {hello.device_name}".strip()
            who.add(f"  {device}").add(f"  {hello.host} pid {hello.pid}  {hello.backend}", muted)
            who.add(f"  torch {hello.torch_version}" if hello.torch_version else "", muted)
        if view.ended and state.goodbye is None:
            now.add("ended", muted)
        elif beat is not None:
            where = f"{beat.phase} {beat.micro_step}/{beat.micro_steps}" if beat.micro_step else beat.phase
            now.add(where, view.palette.phase_text(beat.phase)).add(f", step {beat.step}", muted)
        if step is not None:
            waits = view.state.waits.window()
            waited, cost = waits.waited_ms.get(self.rank), waits.caused_ms.get(self.rank, 0.0)
            for label, value in (
                ("step", ms_text(step.step_ms)),
                ("exposed communication", ms_text(step.wait_ms)),
                (f"mean of {WINDOW_STEPS} steps: wait", ms_text(waited)),
                ("cost to others", ms_text(cost if waited is not None else None)),
                ("tokens/s", count_text(step.tokens_per_s)),
            ):
                if now.width + len(label) + len(value) + 3 <= width:
                    now.add(f"  {label} ", muted).add(value)
        if state.packets_lost or (beat is not None and beat.dropped):
            lost = state.packets_lost + (beat.dropped if beat else 0)
            now.add(f"  {lost} messages lost", view.palette.style("warning"))
        return [who, now, *self._more(view, width)][:height]

    def _more(self, view: View, width: int) -> list[Row]:
        rows = _gpu_rows(view, self.rank, width)
        if self.screen.size.height >= ROOMY:
            rows += [
                row for row in (_parts_row(view, self.rank), _speed_row(view, self.rank, width)) if row is not None
            ]
        return rows

    def natural_height(self, width: int) -> int:
        return 2 + self.more_lines


def _parts_row(view: View, number: int) -> Row | None:
    """Where the time of a step goes (zerotop/state/breakdown.py)."""
    report = view.state.time_report
    parts = report.parts_ms.get(number) if report is not None and not view.ended else None
    step_ms = sum(parts.values()) if parts else 0.0
    if not parts or step_ms <= 0:
        return None
    row, muted = Row().gap().add("a step", view.palette.style("muted")), view.palette.style("muted")
    for part, part_ms in sorted(parts.items(), key=lambda item: -item[1]):
        if part_ms >= 0.005 * step_ms:
            row.gap(2).add(f"{part} ", muted).add(f"{ms_text(part_ms)} {part_ms / step_ms:.0%}")
    return row


def _speed_row(view: View, number: int, width: int) -> Row | None:
    """MFU and the binding ceiling, as far as they are known and fit."""
    rank = view.state.ranks.get(number)
    if rank is None or view.ended:
        return None
    efficiency, ceiling = rank_efficiency(view.state, rank), rank_ceiling(view.state, number)
    row, muted = Row().gap(), view.palette.style("muted")
    tflops = efficiency.tflops
    text = efficiency.text if tflops is not None else ""
    sentence = ceiling.text if ceiling is not None else ""
    if tflops is not None and sentence and len(text) + len(sentence) + 12 > width:
        # Why there is no MFU is the lesser news.
        text = f"{digits_text(tflops)} TFLOPS" if efficiency.mfu is None else f"{efficiency.mfu:.1%} MFU"
    if text and len(text) + 1 <= width:
        row.add(text)
    if sentence and row.width + len(sentence) + 11 <= width:
        row.gap(2 if text else 0).add("ceiling ", muted).add(sentence)
    return row if row.width > 1 else None


def _gpu_rows(view: View, number: int, width: int) -> list[Row]:
    """The facts of the rank's GPU: what is out of order first, then as many figures as fit into two lines."""
    rank, palette = view.state.ranks.get(number), view.palette
    gpu = gpu_of(view.state, rank) if rank is not None else None
    if gpu is None:
        return []
    muted = palette.style("muted")
    found = concerns(view.state).get(number, ())
    pieces: list[list[tuple[str, Style]]] = [
        [(f"▲ {one.word}", palette.style(one.severity, bold=True))] for one in found
    ]
    pieces += [[(f"{label} ", muted), (value, muted if view.stale else PLAIN)] for label, value in gpu_items(gpu)]
    if missing := missing_text(gpu):
        longest = max(0, width - 6)
        text = missing if cell_len(missing) <= longest else fit(missing, longest)
        pieces.insert(len(found) + 4, [(text, palette.style("warning"))])
    energy = view.state.energy_use()
    if energy is not None:
        pieces.append([("run ", muted), (f"{energy_text(energy.joules_per_step)}/step", PLAIN)])
        if energy.joules_per_million_tokens is not None:
            million = f"{energy_text(energy.joules_per_million_tokens)} per million tokens"
            pieces[-1].append((f", {million}", PLAIN))
    rows = [Row().gap().add(f"GPU {gpu.index}", palette.style("primary", bold=True))]
    if gpu.lost:  # nothing else is known
        pieces = [[(f"▲ lost: {one.text}", palette.style(one.severity, bold=True))] for one in found]
    for piece in pieces:
        size = sum(cell_len(text) for text, _ in piece) + 2
        if rows[-1].width + size > width:
            if len(rows) == 2:
                continue  # a shorter one may fit
            rows.append(Row().gap(4))
        rows[-1].gap(2)
        for text, style in piece:
            rows[-1].add(text, style)
    return rows


class Timeline(Panel, can_focus=True):
    """The phases of the last steps."""

    READS = ("phases", "collectives")

    def __init__(self, rank: int) -> None:
        super().__init__(id="timeline")
        self.rank = rank
        self.entitle("3 phases of the last steps")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        state = view.state.ranks.get(self.rank)
        return timeline_rows(
            state.spans if state else (), state.collectives if state else (), view.palette, width, height
        )


class CollectiveTable(Panel, can_focus=True):
    """The newest collectives that all ranks have reported: the transfer time, and which rank waited for which."""

    READS = ("collectives",)

    def __init__(self, rank: int) -> None:
        super().__init__(id="collectives")
        self.rank = rank
        self.entitle("4 collectives")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        groups = len(view.state.waits.groups) > 1
        columns = [("number", 8), ("what", 16), ("bytes", 9), ("transfer", 9), ("waited", 9), ("came last", 10)]
        columns[1:1] = [("group", 10)] if groups else []
        columns += [("bandwidth", 11)] if width >= 84 + 11 * groups else []
        head = Row()
        for title, size in columns:
            head.cell(title, size, muted, right=title not in {"what", "group"}).gap()
        rows = [head]
        for meeting in list(view.state.waits.meetings)[-max(0, height - 1) :][::-1] if height > 1 else []:
            waited_us = meeting.waited_us.get(self.rank, 0)
            last = meeting.last_rank == self.rank
            row = Row().cell(str(meeting.seq), 8, right=True).gap()
            if groups:
                row.cell(meeting.group, 10, muted).gap()
            row.cell(meeting.op, 16).gap()
            row.cell(bytes_text(meeting.bytes), 9, right=True).gap().cell(
                ms_text(meeting.transfer_us / 1000), 9, right=True
            )
            row.gap().cell(ms_text(waited_us / 1000), 9, PLAIN if waited_us >= 1000 else muted, right=True).gap()
            row.cell(
                "▲ this" if last else f"rank {meeting.last_rank}",
                10,
                view.palette.style("warning") if last else muted,
                right=True,
            )
            if width >= 84 + 11 * groups:
                crossed = meeting.bytes * bus_factor(meeting.op, view.state.world_size)
                rate = crossed / meeting.transfer_us * 1e6 if meeting.transfer_us else None
                row.gap().cell(f"{bytes_text(rate)}/s" if rate else MISSING, 11, muted, right=True)
            rows.append(row)
        if len(rows) == 1:
            rows.append(Row().gap().add("none yet that all ranks have reported", muted))
        return rows


class RankScreen(LiveScreen):
    """The page of one rank."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.back", "Back", show=True),
        Binding("left_square_bracket", "other(-1)", "Previous rank", show=True),
        Binding("right_square_bracket", "other(1)", "Next rank", show=True),
    ]

    def __init__(self, palette: Palette, rank: int) -> None:
        super().__init__()
        self.palette = palette
        self.rank = rank

    def compose(self) -> ComposeResult:
        yield VerdictLine(id="verdict")
        yield Header(id="header")
        yield RankFacts(self.rank)
        yield Timeline(self.rank)
        with Horizontal(id="middle"):
            yield CollectiveTable(self.rank)
            memory = MemoryPanel(id="memory")
            memory.rank, memory.full = self.rank, True
            yield memory
        yield EventPanel(id="events", title="6 log and events of this rank", rank=self.rank)
        yield KeyBar(self.palette)

    def action_other(self, by: int) -> None:
        """Switch to another rank."""
        count = max(1, self.app.rank_count)  # type: ignore[attr-defined]
        self.rank = (self.rank + by) % count
        for kind in (RankFacts, Timeline, CollectiveTable, MemoryPanel, EventPanel):
            self.query_one(kind).rank = self.rank  # type: ignore[attr-defined]
        self.query_one(EventPanel).forget()
        self.refresh_panels()
