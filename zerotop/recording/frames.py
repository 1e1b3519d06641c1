"""The moments of a recording. A frame is as long as its samples are apart: one second, ten, or a minute."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zerotop.hub.blocks import SPACING_S, BlockInfo


@dataclass(frozen=True)
class Stretch:
    """Frames without a gap between them: `count` of `spacing_s` seconds each, from `begin_s` on."""

    begin_s: int
    spacing_s: int
    count: int
    first: int
    """The number of its first frame in the recording."""

    @property
    def end_s(self) -> int:
        """Where its last frame ends."""
        return self.begin_s + self.spacing_s * self.count


class Frames:
    """All frames of a recording in the order of time, numbered from 0. Times are the hub's wall seconds."""

    def __init__(self, blocks: Sequence[BlockInfo] = (), seconds: Iterable[int] = ()) -> None:
        """`seconds`: those, ascending, in which rows were recorded that are in no block yet."""
        found: list[tuple[int, int, int]] = []  # begin, spacing, end
        for block in blocks:
            spacing = SPACING_S[block.level]
            begin = int(block.first_wall_s // spacing) * spacing
            found.append((begin, spacing, int(block.last_wall_s // spacing) * spacing + spacing))
        found.sort()
        for second in seconds:
            if found and found[-1][1] == 1 and found[-1][0] <= second <= found[-1][2]:
                found[-1] = (found[-1][0], 1, max(found[-1][2], second + 1))
            elif not found or second >= found[-1][2]:
                found.append((second, 1, second + 1))
        self.stretches: list[Stretch] = []
        self.count = 0
        reached = 0
        for begin, spacing, end in found:
            begin = max(begin, reached)  # the clock was set back: no moment is shown twice
            count = -(-(end - begin) // spacing)
            last = self.stretches[-1] if self.stretches else None
            if last is not None and last.end_s == begin and last.spacing_s == spacing:
                self.stretches[-1] = replace(last, count=last.count + count)
                self.count += count
                reached = begin + count * spacing
            elif count > 0:
                self.stretches.append(Stretch(begin, spacing, count, self.count))
                self.count += count
                reached = begin + count * spacing
        self._begins = [one.begin_s for one in self.stretches]
        self._firsts = [one.first for one in self.stretches]

    @property
    def begin_s(self) -> float:
        """Where the recording begins; 0 if it is empty."""
        return float(self.stretches[0].begin_s) if self.stretches else 0.0

    @property
    def end_s(self) -> float:
        """Where it ends."""
        return float(self.stretches[-1].end_s) if self.stretches else 0.0

    def span(self, number: int) -> tuple[float, float]:
        """From when to when the frame lasts."""
        if not 0 <= number < self.count:
            raise IndexError(f"frame {number}: expected 0 to {self.count - 1}")
        one = self.stretches[bisect_right(self._firsts, number) - 1]
        begin = one.begin_s + (number - one.first) * one.spacing_s
        return float(begin), float(begin + one.spacing_s)

    def at(self, wall_s: float) -> int:
        """The frame of a moment; in a gap the next one, and beyond an end the first or the last one."""
        place = bisect_right(self._begins, wall_s) - 1
        if place < 0:
            return 0
        one = self.stretches[place]
        if wall_s >= one.end_s:
            return min(one.first + one.count, self.count - 1)
        return one.first + int((wall_s - one.begin_s) // one.spacing_s)
