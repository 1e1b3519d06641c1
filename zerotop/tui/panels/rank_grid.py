"""All ranks at once: a cell for each, grouped by host and shaded by one figure, and below them the selected rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType

from zerotop.state.gpu import Concern, concerns
from zerotop.state.run import RankState
from zerotop.tui.abilities import Figured, Filterable
from zerotop.tui.panels.grid_figures import Cell, FigureReader, GridFigure
from zerotop.tui.panels.rank_cells import OUTCOMES
from zerotop.tui.panels.rank_panel import RankPanel
from zerotop.tui.panels.ranks import RankTable, passes
from zerotop.tui.view import View, stale_after_s
from zerotop.tui.widgets.blocks import Blocks, Piece, arrange
from zerotop.tui.widgets.lines import PLAIN, Row, fit

NUMBERS_FROM = 3
"""Columns from which a cell holds a number; a narrower one has a digit, the tenth of its heat."""
LEAST_LINES = 2
"""Of the panel: one of cells, and the selected rank."""
SHORT_HOST, LONG_HOST = 7, 14
"""Columns for the name of a host."""
LONG_HOST_FROM = LONG_TITLE_FROM = 110
NO_FIGURE = "·"
Group = tuple[str, list[int]]
"""(host, its ranks)."""
SIGNS = (
    ("▲", "the verdict names it"),
    ("!", "GPU alarm"),
    ("✖", "failed"),
    ("▌", "selected"),
    (NO_FIGURE, "no figure, or the filter leaves it out"),
)
"""The signs of cells, for the help."""


class RankGrid(RankPanel, Filterable, Figured):
    """Every rank has its place, whatever the filter is. Enter opens the selected one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move_line(-1)", "The line above", show=False),
        Binding("down,j", "move_line(1)", "The line below", show=False),
        Binding("left,h", "move(-1)", "Previous rank", show=False),
        Binding("right,l", "move(1)", "Next rank", show=False),
        Binding("pageup", "move_line(-5)", show=False),
        Binding("pagedown", "move_line(5)", show=False),
        Binding("home", "move(-100000)", show=False),
        Binding("end", "move(100000)", show=False),
        Binding("enter", "open", "Open rank", show=False),
    ]
    READS = RankTable.READS
    FLICKERS = RankTable.FLICKERS
    FILTER_HINT = RankTable.FILTER_HINT

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="framed")
        self.selected = 0
        self.filter = ""
        self.by_value = False
        """Whether the worst rank stands first, and the hosts are mixed."""
        self.reverse = False
        self.figure: GridFigure | None = None
        """What shades the cells."""
        self.hosts: tuple[Group, ...] = ()
        self._reader = FigureReader()
        self._read_figures: dict[GridFigure, dict[int, Cell]] = {}
        self._cells: dict[int, Cell] = {}
        self._groups: tuple[Group, ...] = ()
        """Those of the blocks: `hosts`, or one of all ranks."""
        self._blocks = Blocks(1, 0, 0, ())
        self._places: dict[int, tuple[int, int]] = {}
        self._chosen: frozenset[int] = frozenset()
        """The ranks that the filter lets through."""
        self._concerns: dict[int, tuple[Concern, ...]] = {}
        self._looked_at: tuple[int, ...] = ()
        self._grouped_at: tuple[int, ...] = ()

    # ---- what is shown ---------------------------------------------------------------------------------------------
    def inputs(self, view: View) -> object:
        return super().inputs(view), view.verdict, view.stall

    def notice(self, view: View) -> None:
        there = (*view.state.revision(("hello",)), len(view.state.ranks))
        if there != self._grouped_at:
            self._grouped_at, self.hosts = there, grouped(view)

    def rows_wanted(self, width: int, most: int) -> int:
        """Lines for cells as large as fit into `most`, the selected rank and the border."""
        room = (width - self.gutter.width, most - self.gutter.height - 1)
        blocks = arrange([ranks for _, ranks in self.hosts], *room, _label(self.hosts, width))
        return max(LEAST_LINES, blocks.lines + 1) + self.gutter.height

    def accept(self, view: View) -> None:
        nodes = view.state.revision(("node", "hello"))
        if nodes != self._looked_at:
            self._looked_at, self._concerns = nodes, concerns(view.state)
        self._read_figures = self._reader.read(view)
        shown = self.figure if self.figure in self._read_figures else next(iter(self._read_figures))
        self.figure, self._cells = shown, self._read_figures[shown]
        everyone = [rank for _, ranks in self.hosts for rank in ranks]
        self._chosen = frozenset(n for n in everyone if passes(view, n, self.filter, self._concerns.get(n, ())))
        self._groups = (("", self._sorted(shown, everyone)),) if self.by_value else self.hosts
        self._arrange()
        self.entitle(self._heading(shown, len(everyone)))

    def _sorted(self, figure: GridFigure, ranks: Sequence[int]) -> list[int]:
        """The worst first, or last; those without a figure come behind them."""
        sign = -1.0 if figure.low else 1.0
        known = [rank for rank in ranks if rank in self._cells]
        known.sort(key=lambda rank: (-self._cells[rank].heat, -sign * self._cells[rank].value, rank))
        return (known[::-1] if self.reverse else known) + [rank for rank in ranks if rank not in self._cells]

    def _arrange(self) -> None:
        width, height = self.scrollable_content_region.size
        ranks = [those for _, those in self._groups]
        if self.by_value:  # the numbers of the ranks, and in front of each line the value of its first one
            digits = len(str(max((rank for those in ranks for rank in those), default=0)))
            self._blocks = arrange(ranks, width, max(1, height - 1), 10, digits + 1)
        else:
            self._blocks = arrange(ranks, width, max(1, height - 1), _label(self._groups, self.outer_size.width))
        self._places = self._blocks.places()
        self.have_lines(self._blocks.lines + 1)

    def _heading(self, figure: GridFigure, count: int) -> str:
        wide = self.outer_size.width >= LONG_TITLE_FROM
        title = f"{count} ranks · {figure.title}" if wide else figure.title
        cells = {rank: cell for rank, cell in self._cells.items() if rank in self._chosen}
        worst = figure.worst_of(cells)
        if worst is not None:
            values = [cell.value for cell in cells.values()]
            three = (min(values), statistics.median(values), max(values))
            words = " · min {}, median {}, max {}" if wide else " · {} … {} … {}"
            title += words.format(*map(figure.write, three))
            title += f" · {figure.worst}: rank {worst}"
        if self.by_value:
            title += f" · sorted {'▲' if self.reverse else '▼'}"
        if self.filter:
            title += f" · filter “{self.filter}” · {len(self._chosen)} of {count}"
        return title

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def draw(self, view: View, width: int, height: int) -> list[Row]:
        muted = view.palette.style("muted")
        if not view.state.ranks or self.figure is None:
            return [Row().add("waiting for ranks to connect".center(width), muted)]
        by_line: dict[int, list[Piece]] = {}
        for piece in self._blocks.pieces:
            by_line.setdefault(piece.y, []).append(piece)
        first = self.scroll_offset.y
        late_ns = view.state.hub_now_ns - int(stale_after_s(view.state) * 1e9)
        rows = []
        for y in range(first, first + height - 1):
            row = Row()
            for piece in by_line.get(y, ()):
                row.to(piece.x).add(self._label(piece), muted)
                for rank in piece.items:
                    row.extend(self._cell(view, rank, late_ns), self._blocks.cell)
            rows.append(row)
        return [*rows, self._details(view, width)]

    def _label(self, piece: Piece) -> str:
        """In front of a line of cells: its host and its first rank; if they are sorted, the value of that."""
        size = self._blocks.label - 1
        if self.by_value:
            cell = self._cells.get(piece.items[0])
            text = self.figure.write(cell.value) if cell is not None and self.figure is not None else NO_FIGURE
            return fit(text, size, right=True) + " "
        number = str(piece.items[0])
        host = self._groups[piece.group][0] if piece.head else ""
        room = size - len(number) - 1
        return f"{_end_of(host, room):<{max(0, room)}} {number} " if room > 0 else fit(number, size, right=True) + " "

    def _cell(self, view: View, number: int, late_ns: int) -> list[Segment]:
        """A sign, where there is room for one, and the figure on the colour of its heat."""
        palette, size = view.palette, self._blocks.cell
        state = view.state.ranks.get(number)
        cell = self._cells.get(number)
        chosen = number == self.selected
        sign, colour = self._sign(view, number, state)
        late = state is None or (state.heard_ns and state.heard_ns < late_ns)
        grey = (view.stale or late) and not view.ended
        if number not in self._chosen or cell is None:
            text, style = NO_FIGURE, palette.style("muted")
        else:
            text = self._text(number, cell, size)
            style = palette.style("muted") if grey else palette.heat(cell.heat)
        if sign and size < 2:
            text, style = sign, palette.style(colour, bold=True)
        if chosen:
            # No colour of the scale, or it would look hot.
            style = palette.style("foreground" if self.has_focus else "muted", bold=True, reverse=True)
        if size < 2:
            return [Segment(text, style)]
        room = size - 1
        text = text.rjust(min(3, room)).center(room) if room > 3 else text.rjust(room)
        lead = sign or ("▌" if chosen else " ")
        return [Segment(lead, palette.style(colour if sign else "primary", bold=True)), Segment(text, style)]

    def _text(self, number: int, cell: Cell, size: int) -> str:
        if self.by_value and size > len(str(number)):
            return str(number)
        if size < NUMBERS_FROM:
            return str(min(9, int(10 * cell.heat)))
        room = size - 1
        return cell.text if len(cell.text) <= room else "-9" if cell.text.startswith("-") else "9" * room

    def _sign(self, view: View, number: int, state: RankState | None) -> tuple[str, str]:
        if state is not None and state.goodbye is not None and state.goodbye.outcome in ("failed", "aborted"):
            return OUTCOMES[state.goodbye.outcome]
        stall = view.stall
        if view.blames(number):
            severe = view.verdict is not None and view.verdict.severity == "error"
            return "▲", "error" if severe else "warning"
        if stall is not None and number in (*stall.missing, *stall.silent):
            return "▲", "error"
        found = self._concerns.get(number)
        return ("!", found[0].severity) if found else ("", "muted")

    def _details(self, view: View, width: int) -> Row:
        """The selected rank: what is wrong with it, what it does, and as many of the figures as fit."""
        palette = view.palette
        muted = palette.style("muted")
        number = self.selected
        state = view.state.ranks.get(number) or RankState(number)
        row = Row().add(f" rank {number}", palette.style("primary", bold=True))
        pieces: list[tuple[str, str, Style]] = []
        for concern in self._concerns.get(number, ()):
            pieces.append(("", f"! {concern.word}", palette.style(concern.severity, bold=True)))
        if view.blames(number):
            pieces.append(("", "▲ named by the verdict", palette.style("warning", bold=True)))
        beat = state.heartbeat
        micro = f" {beat.micro_step}/{beat.micro_steps}" if beat is not None and beat.micro_step else ""
        phase = "ended" if view.ended and state.goodbye is None else state.phase
        pieces.append(("", phase + ("" if view.ended else micro), palette.phase_text(state.phase)))
        if state.hello is not None:
            pieces.append((f"{_short(state.hello.host)} ", state.hello.device, PLAIN))
        for figure, cells in self._read_figures.items():
            if number in cells:
                pieces.append((f"{figure.short} ", figure.write(cells[number].value), PLAIN))
        for label, value, style in pieces:
            if row.width + 2 + len(label) + len(value) <= width:
                row.gap(2).add(label, muted).add(value, style)
        return row

    # ---- figure, order and filter ----------------------------------------------------------------------------------
    def next_figure(self) -> None:
        """Shade the cells by the next figure that the run has."""
        known = list(self._read_figures)
        if self.figure in known:
            self.figure = known[(known.index(self.figure) + 1) % len(known)]
            self.redraw()

    def next_sort(self) -> None:
        """The worst rank first, or each at its place."""
        self.by_value = not self.by_value
        self.redraw()
        self._follow_selected()

    def reverse_sort(self) -> None:
        """The worst rank last, or first."""
        self.by_value, self.reverse = True, not self.reverse
        self.redraw()
        self._follow_selected()

    def set_filter(self, text: str) -> None:
        """Leave the cells of ranks empty whose number, device, host, phase and alarms do not contain `text`."""
        self.filter = text.strip()
        self.redraw()

    # ---- keys and mouse --------------------------------------------------------------------------------------------
    def action_move(self, by: int) -> None:
        """Move the selection along the ranks that the filter lets through."""
        order = [rank for piece in _reading(self._blocks) for rank in piece.items if rank in self._chosen]
        if order:
            at = order.index(self.selected) + by if self.selected in order else 0
            self.select_rank(order[min(len(order) - 1, max(0, at))])

    def action_move_line(self, by: int) -> None:
        """Move the selection up or down, to the nearest cell of the line."""
        x, y = self._places.get(self.selected, (0, 0))
        lines = sorted({line for rank, (_, line) in self._places.items() if rank in self._chosen})
        beyond = [line for line in lines if (line > y if by > 0 else line < y)]
        if not beyond:
            return
        line = beyond[min(len(beyond), abs(by)) - 1] if by > 0 else beyond[-min(len(beyond), abs(by))]
        there = [rank for rank in self._chosen if self._places[rank][1] == line]
        self.select_rank(min(there, key=lambda rank: (abs(self._places[rank][0] - x), rank)))

    def select_rank(self, number: int) -> None:
        self.selected = number
        self._follow_selected()
        self.tell_selected()

    def _follow_selected(self) -> None:
        if self.selected in self._places:
            line = self._places[self.selected][1]
            self.scroll_line_into_view(line, max(1, self.scrollable_content_region.height - 1))

    def rank_at(self, column: int, line: int) -> int | None:
        if line >= self.scrollable_content_region.height - 1:
            return None  # the line of the selected rank
        return self._blocks.item_at(column, line + self.scroll_offset.y)


def grouped(view: View) -> tuple[Group, ...]:
    """The ranks of each host, in the order of the ranks. One that has not connected yet is on a host without a name."""
    count = max(max(view.state.ranks, default=-1) + 1, view.state.world_size)
    found: dict[str, list[int]] = {}
    for number in range(count):
        state = view.state.ranks.get(number)
        host = state.hello.host if state is not None and state.hello is not None else ""
        found.setdefault(host, []).append(number)
    return tuple((_short(host), ranks) for host, ranks in found.items())


def _label(groups: Sequence[Group], width: int) -> int:
    """Columns in front of a line of cells: the host, where there are several, and the first rank."""
    digits = len(str(max((ranks[-1] for _, ranks in groups), default=0)))
    most = LONG_HOST if width >= LONG_HOST_FROM else SHORT_HOST
    host = min(most, max(len(name) for name, _ in groups)) if len(groups) > 1 else 0
    return digits + 1 + (host + 1 if host else 0)


def _short(host: str) -> str:
    """Without its domain."""
    return host.partition(".")[0]


def _end_of(host: str, room: int) -> str:
    """What fits of a host's name: its end, where the names of hosts differ."""
    return host if len(host) <= room else "…" + host[len(host) - room + 1 :] if room > 1 else ""


def _reading(blocks: Blocks) -> list[Piece]:
    """The pieces group by group."""
    return sorted(blocks.pieces, key=lambda piece: (piece.group, piece.y))
