"""Which steps all plots show, and the cursor that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zerotop.state.run import RunState

LEAST_STEPS = 8.0
"""A plot shows no fewer steps than this."""


@dataclass(frozen=True)
class Lens:
    """`first` and `last` are the steps at the edges: both None for the whole run, `last` None while the newest step is
    followed. `cursor` is a step."""

    cursor: int | None = None
    first: float | None = None
    last: float | None = None
    log: bool = False
    smooth: bool = True
    overlay: bool = True
    """Whether the curves of earlier runs are drawn."""

    @property
    def whole(self) -> bool:
        """Whether the whole run is shown."""
        return self.first is None

    def window(self, extent: tuple[float, float]) -> tuple[float, float]:
        """The steps at the edges of a plot. extent: the first and the last step of the run."""
        begin, end = extent
        if self.first is None:
            return extent
        if self.last is None:  # follows: as wide as it was when the zoom was made
            return max(begin, end - self.first), end
        return max(begin, self.first), min(end, self.last)

    def zoomed(self, factor: float, extent: tuple[float, float]) -> Lens:
        """Show 1/factor of the steps, around the cursor; without one the newest."""
        left, right = self.window(extent)
        width = max(LEAST_STEPS, (right - left) / factor)
        if width >= extent[1] - extent[0]:
            return replace(self, first=None, last=None)
        if self.cursor is None and right >= extent[1]:
            return replace(self, first=width, last=None)
        middle = float(self.cursor) if self.cursor is not None else (left + right) / 2
        share = (middle - left) / (right - left) if right > left else 0.5
        return self._between(middle - share * width, width, extent)

    def panned(self, share: float, extent: tuple[float, float]) -> Lens:
        """Move by a share of what is shown."""
        left, right = self.window(extent)
        if self.whole:
            return self
        return self._between(left + share * (right - left), right - left, extent)

    def _between(self, left: float, width: float, extent: tuple[float, float]) -> Lens:
        left = max(extent[0], min(left, extent[1] - width))
        if left + width >= extent[1]:
            return replace(self, first=width, last=None)
        return replace(self, first=left, last=left + width)

    def moved(self, by: int, steps: list[int]) -> Lens:
        """Move the cursor by so many of the known steps, and keep it in sight; without one it begins at the right."""
        if not steps:
            return self
        extent = (float(steps[0]), float(steps[-1]))
        left, right = self.window(extent)
        if self.cursor is None:
            inside = [step for step in steps if step <= right]
            return replace(self, cursor=inside[-1] if inside else steps[-1])
        place = min(range(len(steps)), key=lambda at: abs(steps[at] - (self.cursor or 0)))
        cursor = steps[max(0, min(len(steps) - 1, place + by))]
        lens = replace(self, cursor=cursor)
        if left <= cursor <= right:
            return lens
        return lens._between(cursor - (right - left) / 2, right - left, extent)


def extent(state: RunState) -> tuple[float, float]:
    """The first and the last step of the run that are known."""
    first, newest = state.series.first, state.series.newest
    return (float(first.step), float(newest.step)) if first is not None and newest is not None else (0.0, 1.0)
