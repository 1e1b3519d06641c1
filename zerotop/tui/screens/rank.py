"""One rank in full: its phases in the last steps, its collectives, its memory and its log."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal

from zerotop.format import bytes_text, count_text, ms_text
from zerotop.state.memory import gpu_of
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
from zerotop.tui.widgets.lines import PLAIN, Panel, Row
from zerotop.tui.widgets.timeline import timeline_rows


class RankFacts(Panel):
    """What the rank is and what it does, in two lines."""

    ALLOW_MAXIMIZE = False

    def __init__(self, rank: int) -> None:
        super().__init__(id="facts")
        self.rank = rank

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
        gpu = gpu_of(view.state, state)
        if gpu is not None and gpu.clock_reasons:
            now.add("  clocks limited by ", muted).add(", ".join(gpu.clock_reasons), view.palette.style("warning"))
        if state.packets_lost or (beat is not None and beat.dropped):
            lost = state.packets_lost + (beat.dropped if beat else 0)
            now.add(f"  {lost} messages lost", view.palette.style("warning"))
        return [who, now][:height]

    def natural_height(self, width: int) -> int:
        return 2


class Timeline(Panel, can_focus=True):
    """The phases of the last steps."""

    def __init__(self, rank: int) -> None:
        super().__init__(id="timeline")
        self.rank = rank
        self.entitle("1 phases of the last steps")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        state = view.state.ranks.get(self.rank)
        return timeline_rows(state.spans if state else (), view.palette, width, height)


class CollectiveTable(Panel, can_focus=True):
    """The newest collectives that all ranks have reported: the transfer time, and which rank waited for which."""

    def __init__(self, rank: int) -> None:
        super().__init__(id="collectives")
        self.rank = rank
        self.entitle("2 collectives")

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        columns = (("number", 8), ("what", 16), ("bytes", 9), ("transfer", 9), ("waited", 9), ("came last", 10))
        head = Row()
        for title, size in columns:
            head.cell(title, size, muted, right=title not in {"what"}).gap()
        rows = [head]
        for meeting in list(view.state.waits.meetings)[-max(0, height - 1) :][::-1] if height > 1 else []:
            waited_us = meeting.waited_us.get(self.rank, 0)
            last = meeting.last_rank == self.rank
            row = Row().cell(str(meeting.seq), 8, right=True).gap().cell(meeting.op, 16).gap()
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
            rows.append(row)
        if len(rows) == 1:
            rows.append(Row().gap().add("none yet that all ranks have reported", muted))
        return rows


class RankScreen(LiveScreen):
    """The page of one rank."""

    PANELS: ClassVar[dict[str, str]] = {
        "ranks": "timeline",
        "learning": "collectives",
        "memory": "memory",
        "events": "events",
    }
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
        yield Header(id="header")
        yield VerdictLine(id="verdict")
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
