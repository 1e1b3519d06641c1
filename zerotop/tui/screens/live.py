"""The base of screens with live panels: each of their panels gets every tick's view."""

from __future__ import annotations

from typing import ClassVar

from textual.screen import Screen

from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, ScrollPanel


class LiveScreen(Screen[None]):
    """A screen whose panels show the run."""

    ALLOW_IN_MAXIMIZED_VIEW = "Header,KeyBar,FilterField,.-textual-system"
    PANELS: ClassVar[dict[str, str]] = {}
    """The name of a panel key (`panel.NAME` in keys.py) -> the id of what it goes to here."""
    view: View | None = None
    lines_below = 0
    """Lines that a bar above the footer takes."""

    def focus_panel(self, name: str) -> None:
        """Focus a panel; one for which this size has no room is shown alone."""
        panel = self.query_one(f"#{self.PANELS[name]}")
        if self.maximized is not None and self.maximized is not panel:
            self.unzoom()
        shown = panel.display and all(parent.display for parent in panel.ancestors if hasattr(parent, "display"))
        if not shown:
            self.zoom(panel)
        self.set_focus(panel)

    def show_view(self, view: View) -> None:
        """One batch of repaints for all panels. Only the topmost screen gets views."""
        self.view = view
        with self.app.batch_update():
            for panel in self.query(Panel):
                panel.show(view)
            for scroller in self.query(ScrollPanel):
                scroller.show(view)

    def refresh_panels(self) -> None:
        """Draw the last view again."""
        if self.view is not None:
            self.show_view(self.view)

    def zoom(self, panel: object) -> None:
        """Give the whole screen to a panel."""
        if isinstance(panel, Panel | ScrollPanel) and panel.allow_maximize:
            self.maximize(panel)
            self.call_after_refresh(self.refresh_panels)

    def unzoom(self) -> bool:
        """Undo a zoom; False if there was none."""
        if self.maximized is None:
            return False
        self.minimize()
        self.call_after_refresh(self.refresh_panels)
        return True
