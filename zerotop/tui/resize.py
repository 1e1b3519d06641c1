"""Panes are resized by dragging the border between two of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widget import Widget

LEAST_ROWS, LEAST_COLUMNS = 3, 12


@dataclass(frozen=True)
class _Drag:
    """The two neighbours, and where the mouse was."""

    before: Widget
    after: Widget
    upright: bool
    """Whether one is above the other."""
    at: int
    sizes: tuple[int, int]


class PaneResizer:
    """Changes the sizes of two neighbours in a container; together they keep theirs."""

    def __init__(self, screen: Screen[None]) -> None:
        self._screen = screen
        self._drag: _Drag | None = None
        self._containers: dict[Widget, None] = {}
        """Containers of which the user has set the sizes."""

    def take(self, x: int, y: int) -> bool:
        """Begin if there is a border between two panes at this place of the screen."""
        self._drag = (self._screen.maximized is None and self._found(x, y)) or None
        return self._drag is not None

    def _found(self, x: int, y: int) -> _Drag | None:
        for container in self._screen.query("Horizontal, Vertical"):
            if not isinstance(container, Horizontal | Vertical) or not container.region.contains(x, y):
                continue
            upright = isinstance(container, Vertical)
            children = [child for child in container.children if child.display and child.region.area]
            for before, after in pairwise(children):
                edge = after.region.y if upright else after.region.x
                place = y if upright else x
                region = after.region
                inside = region.x <= x < region.right if upright else region.y <= y < region.bottom
                if place in (edge, edge - 1) and inside and _bordered(before, after, place - edge, upright):
                    sizes = (
                        (before.outer_size.height, after.outer_size.height)
                        if upright
                        else (before.outer_size.width, after.outer_size.width)
                    )
                    return _Drag(before, after, upright, place, sizes)
        return None

    def move(self, x: int, y: int) -> bool:
        """Follow the mouse. True if sizes have changed."""
        drag = self._drag
        if drag is None:
            return False
        by = (y if drag.upright else x) - drag.at
        least = LEAST_ROWS if drag.upright else LEAST_COLUMNS
        whole = sum(drag.sizes)
        first = max(least, min(whole - least, drag.sizes[0] + by))
        container = drag.before.parent
        if whole < 2 * least or not isinstance(container, Widget):
            return False
        self._fix(container, drag.upright)
        for widget, size in ((drag.before, first), (drag.after, whole - first)):
            if drag.upright:
                widget.styles.height = f"{size}fr"
            else:
                widget.styles.width = f"{size}fr"
        return True

    def _fix(self, container: Widget, upright: bool) -> None:
        """From now on the shares of the user count, also when the terminal changes its size."""
        if container in self._containers:
            return
        self._containers[container] = None
        container.add_class("-resized")
        children = [child for child in container.children if child.display and child.region.area]
        for child in children:
            size = child.outer_size.height if upright else child.outer_size.width
            if upright and size > 1:  # lines of text keep their height
                child.styles.height = f"{size}fr"
            elif not upright:
                child.styles.width = f"{size}fr"

    def let_go(self) -> None:
        """The button is up."""
        self._drag = None

    def reset(self) -> None:
        """Back to the usual sizes."""
        for container in self._containers:
            container.remove_class("-resized")
            for child in container.children:
                child.styles.height = child.styles.width = None
        self._containers.clear()


def _bordered(before: Widget, after: Widget, offset: int, upright: bool) -> bool:
    """Whether a border is there: the first line of the pane after it, or the last of the one before."""
    widget = after if offset == 0 else before
    gutter = widget.styles.gutter
    if isinstance(widget, Horizontal | Vertical):
        return True
    if upright:
        return bool(gutter.top if offset == 0 else gutter.bottom)
    return bool(gutter.left if offset == 0 else gutter.right)
