"""Cells in blocks, one block for each group, as large as all of them fit: where each stands, and its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GAP = 2
"""Between two blocks."""
CELL_SIZES = (5, 4, 3, 2, 1)
GROUP = 8
"""A line that cannot hold a whole group holds a multiple of so many: hosts have 8 GPUs, or a part of that."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring cells of one group: `items` from column `x` of line `y` on, behind the label. `head`: the first line
    of its group."""

    group: int
    items: tuple[int, ...]
    x: int
    y: int
    head: bool


@dataclass(frozen=True)
class Blocks:
    """`cell`: columns of each. `lines`: of all pieces, in order."""

    cell: int
    label: int
    lines: int
    pieces: tuple[Piece, ...]

    def places(self) -> dict[int, tuple[int, int]]:
        """Item -> (column, line) of its cell."""
        return {
            item: (piece.x + self.label + at * self.cell, piece.y)
            for piece in self.pieces
            for at, item in enumerate(piece.items)
        }

    def item_at(self, x: int, y: int) -> int | None:
        """The item whose cell is there."""
        for piece in self.pieces:
            at = (x - piece.x - self.label) // self.cell
            if piece.y == y and 0 <= at < len(piece.items):
                return piece.items[at]
        return None


def arrange(groups: Sequence[Sequence[int]], width: int, height: int, label: int, least: int = 1) -> Blocks:
    """The blocks of these groups with the largest cells with which they fit into `width` columns and `height` lines; if
    none does, the smallest with which they are not wider. `least`: columns of a cell at least."""
    made = [_with_cells(groups, width, label, cell) for cell in CELL_SIZES if cell >= least]
    return next((one for one in made if one.lines <= height), made[-1])


def _with_cells(groups: Sequence[Sequence[int]], width: int, label: int, cell: int) -> Blocks:
    longest = max((len(group) for group in groups), default=1)
    room = max(1, (width - label) // cell)
    in_line = longest if longest <= room else max(room // GROUP * GROUP, min(room, GROUP // 2), 1)
    beside = max(1, min(len(groups), (width + GAP) // (label + in_line * cell + GAP)))
    pieces: list[Piece] = []
    top = 0
    for first in range(0, len(groups), beside):
        taken = 0
        for column, group in enumerate(groups[first : first + beside]):
            x = column * (label + in_line * cell + GAP)
            for line, at in enumerate(range(0, len(group), in_line)):
                items = tuple(group[at : at + in_line])
                pieces.append(Piece(first + column, items, x, top + line, not line))
                taken = max(taken, line + 1)
        top += taken
    return Blocks(cell, label, top, tuple(pieces))
