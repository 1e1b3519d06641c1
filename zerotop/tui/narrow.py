"""Sends the terminal only the cells that have changed.

Textual repaints a changed piece of a line from the left edge of its widget on. Over a slow line, and with eight ranks
whose phases change four times a second, that is most of what is sent.
"""

from __future__ import annotations

from rich.console import Console
from rich.control import Control
from textual._compositor import ChopsUpdate


class NarrowUpdate(ChopsUpdate):
    """The same update, cropped on both sides."""

    @classmethod
    def of(cls, update: ChopsUpdate) -> NarrowUpdate:
        """The update, cropped."""
        return cls(update.chops, update.spans, update.chop_ends)

    def render_segments(self, console: Console) -> str:
        """The escape sequences of the changed cells."""
        pieces: list[str] = []
        for y, first, last in self.spans:
            for end, (start, strip) in zip(self.chop_ends[y], self.chops[y].items(), strict=False):
                left, right = max(start, first), min(end, last)
                if strip is not None and left < right:
                    pieces.append(Control.move_to(left, y).segment.text)
                    pieces.append(strip.crop(left - start, right - start).render(console))
        return "".join(pieces)
