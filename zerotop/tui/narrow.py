"""Renders, and sends to the terminal, only the cells that have changed.

Textual renders every widget that stands within the smallest rectangle around all changes, every line of it, and sends
each changed piece of a line from the left edge of its widget on. In a screen that counts steps at the top and seconds
at the bottom that is the whole screen, four times a second, and over a slow line most of what is sent.
"""

from __future__ import annotations

from rich.console import Console
from rich.control import Control
from textual._compositor import ChopsUpdate, Compositor
from textual.geometry import Region
from textual.strip import Strip

Piece = tuple[int, int, Strip]
"""Line, column, and what stands from there on."""
Cells = tuple[int, int]
"""The first cell, and the one after the last."""


class NarrowUpdate(ChopsUpdate):
    """The changed pieces of lines, and nothing else."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__([], [], [])
        self.pieces = pieces

    @classmethod
    def of(cls, update: ChopsUpdate) -> NarrowUpdate:
        """The same update, cropped on both sides if it is one of Textual's own compositor."""
        if isinstance(update, NarrowUpdate):
            return update
        pieces: list[Piece] = []
        for y, first, last in update.spans:
            for end, (start, strip) in zip(update.chop_ends[y], update.chops[y].items(), strict=False):
                left, right = max(start, first), min(end, last)
                if strip is not None and left < right:
                    pieces.append((y, left, strip.crop(left - start, right - start)))
        return cls(pieces)

    def render_segments(self, console: Console) -> str:
        """The escape sequences of the pieces."""
        return "".join(Control.move_to(x, y).segment.text + strip.render(console) for y, x, strip in self.pieces)


class NarrowCompositor(Compositor):
    """Asks a widget only for the lines of it that have changed, and only if no other widget hides them."""

    def render_partial_update(self) -> NarrowUpdate | None:
        """The cells that were marked as changed since the last update; None if there are none."""
        spans = list(self._regions_to_spans(self._dirty_regions))
        self._dirty_regions.clear()
        if not spans:
            return None
        missing: dict[int, list[Cells]] = {}
        for y, first, end in spans:
            missing.setdefault(y, []).append((first, end))
        pieces: list[Piece] = []
        for widget, (region, clip) in self.visible_widgets.items():  # from front to back
            seen = region.intersection(clip)
            found = _take(missing, seen)
            if found:
                top, bottom = found[0][0], found[-1][0] + 1
                lines = widget.render_lines(
                    seen.translate(-region.offset)._replace(y=top - region.y, height=bottom - top)
                )
                for y, first, end in found:
                    pieces.append((y, first, lines[y - top].crop(first - seen.x, end - seen.x)))
            if not missing:
                break
        pieces.sort(key=lambda piece: piece[:2])
        return NarrowUpdate(pieces)


def _take(missing: dict[int, list[Cells]], seen: Region) -> list[tuple[int, int, int]]:
    """Take the cells that lie within `seen` out of `missing`. Returns (line, first cell, end), from the top."""
    found: list[tuple[int, int, int]] = []
    left, right = seen.column_span
    for y in sorted(y for y in missing if seen.y <= y < seen.bottom):
        rest: list[Cells] = []
        for first, end in missing[y]:
            start, stop = max(first, left), min(end, right)
            if start >= stop:
                rest.append((first, end))
                continue
            found.append((y, start, stop))
            rest += [cells for cells in ((first, start), (stop, end)) if cells[0] < cells[1]]
        if rest:
            missing[y] = rest
        else:
            del missing[y]
    return found
