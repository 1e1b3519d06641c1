"""What a panel may be able to do beside being drawn: keys look for it."""

from __future__ import annotations


class Filterable:
    """A panel whose lines can be filtered with `/`."""

    FILTER_HINT = ""
    """What can be typed."""
    filter = ""

    def set_filter(self, text: str) -> None:
        """Show only lines that match; an empty text shows all."""
        raise NotImplementedError


class Zoomable:
    """A panel with an axis: it can be zoomed, panned, and read at a cursor."""

    def zoom_by(self, factor: float) -> None:
        """Show less of the axis, or more."""
        raise NotImplementedError

    def pan_by(self, share: float) -> None:
        """Move along the axis by a share of what is shown."""
        raise NotImplementedError

    def move_cursor(self, by: int) -> None:
        """Move the cursor."""
        raise NotImplementedError

    def show_whole(self) -> None:
        """Show everything, without a cursor."""
        raise NotImplementedError


class Figured:
    """A panel that shows one of several figures."""

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return True

    def next_figure(self) -> None:
        """Show the next one."""
        raise NotImplementedError


def figured(panel: object) -> Figured | None:
    """The panel, if it has several figures."""
    return panel if isinstance(panel, Figured) and panel.several else None


def filterable(panel: object) -> Filterable | None:
    """The panel, if it can be filtered."""
    return panel if isinstance(panel, Filterable) else None


def zoomable(panel: object) -> Zoomable | None:
    """The panel, if it has an axis."""
    return panel if isinstance(panel, Zoomable) else None
