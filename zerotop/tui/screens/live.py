"""What the screens with live panels share: every tick's view goes to each of their panels."""

from __future__ import annotations

from typing import ClassVar

from textual.screen import Screen

from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, ScrollPanel


class LiveScreen(Screen[None]):
    ALLOW_IN_MAXIMIZED_VIEW = "Header,KeyBar,FilterField,.-textual-system"
    PANELS: ClassVar[dict[str, str]] = {}
    """The name of a panel key (`panel.NAME` in keys.py) -> the id of what it goes to here."""
    view: View | None = None

    def focus_panel(self, name: str) -> None:
        """Focus a panel; one that this size has no room for is shown alone."""
        panel = self.query_one(f"#{self.PANELS[name]}")
        if self.maximized is not None and self.maximized is not panel:
            self.unzoom()
        shown = panel.display and all(parent.display for parent in panel.ancestors if hasattr(parent, "display"))
        if not shown:
            self.zoom(panel)
        self.set_focus(panel)

    def show_view(self, view: View) -> None:
        """One batch of repaints for all panels; a screen that is not on top is not given anything."""
        self.view = view
        with self.app.batch_update():
            for panel in self.query(Panel):
                panel.show(view)
            for scroller in self.query(ScrollPanel):
                scroller.show(view)

    def refresh_panels(self) -> None:
        if self.view is not None:
            self.show_view(self.view)

    def zoom(self, panel: object) -> None:
        if isinstance(panel, Panel | ScrollPanel) and panel.allow_maximize:
            self.maximize(panel)
            self.call_after_refresh(self.refresh_panels)

    def unzoom(self) -> bool:
        if self.maximized is None:
            return False
        self.minimize()
        self.call_after_refresh(self.refresh_panels)
        return True
