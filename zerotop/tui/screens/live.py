"""The base of screens with live panels: each of their panels gets every tick's view."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widget import Widget

from zerotop.tui.narrow import NarrowCompositor
from zerotop.tui.resize import PaneResizer
from zerotop.tui.view import View
from zerotop.tui.widgets.keybar import KeyBar
from zerotop.tui.widgets.lines import Panel, ScrollPanel

BOXES_FROM = 28
"""From this height on, panels have boxes around them."""


class LiveScreen(Screen[None]):
    """A screen whose panels show the run. Borders between panels can be dragged with the mouse."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "app.open_panel", "More", show=False)]
    ALLOW_IN_MAXIMIZED_VIEW = "Header,KeyBar,FilterField,.-textual-system"
    view: View | None = None
    lines_below = 0
    """Lines that a bar above the footer takes."""

    def __init__(self) -> None:
        super().__init__()
        self._compositor = NarrowCompositor()
        self.resizer = PaneResizer(self)
        self._drawn_panels: list[Panel | ScrollPanel] = []
        self._key_bars: list[KeyBar] = []
        self._styled_for: object = None
        """What the styles of this screen depend on, when it was left."""

    def _looks(self) -> object:
        """What may change its styles while another screen is on top."""
        return self.app.theme, self.app.size, self.app.app_focus, self.app.no_color, self.app.classes

    def _on_screen_resume(self, event: events.ScreenResume) -> None:
        """Textual applies every rule to every widget anew, a third of the time of a key that opens a screen."""
        if self._styled_for is not None and self._looks() == self._styled_for:
            event.refresh_styles = False

    def _on_screen_suspend(self) -> None:
        self._styled_for = self._looks()

    def on_resize(self) -> None:
        """Where lines are few, panels have a line above them instead of a box around them."""
        self.set_class(self.has_class("-narrow") or self.size.height < BOXES_FROM, "-lined")

    def show_view(self, view: View) -> None:
        """One batch of repaints for all panels. Only the topmost screen gets views."""
        self.view = view
        with self.app.batch_update():
            in_sight = self._compositor.visible_widgets
            for panel in self._drawn():
                panel.show(view, panel in in_sight)

    def _drawn(self) -> list[Panel | ScrollPanel]:
        """All panels, looked up once: a query walks through all widgets."""
        if not self._drawn_panels:
            self._drawn_panels = [one for one in self.query("*") if isinstance(one, Panel | ScrollPanel)]
        return self._drawn_panels

    @property
    def key_bars(self) -> list[KeyBar]:
        """The footer, once it is there."""
        if not self._key_bars:
            self._key_bars = list(self.query(KeyBar))
        return self._key_bars

    def forget_panels(self) -> None:
        """There are other panels than before."""
        self._drawn_panels = []

    def refresh_panels(self) -> None:
        """Draw the last view again: what the panels show has changed, and not the run."""
        if self.view is not None:
            for panel in self._drawn():
                panel.expire()
            self.show_view(self.view)

    # ---- one panel alone, or none of it ----------------------------------------------------------------------------
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

    def hide_focused(self) -> bool:
        """Hide the focused panel; False if it is the last one."""
        panel = self.focused
        there = [one for one in self._panels() if one.region.area]
        if not isinstance(panel, Panel | ScrollPanel) or len(there) < 2:
            return False
        self.unzoom()
        self.focus_next()
        panel.add_class("-hidden")
        self.call_after_refresh(self.refresh_panels)
        return True

    def show_all(self) -> bool:
        """Show all panels, in their usual sizes; False if none was hidden."""
        hidden = list(self.query(".-hidden"))
        for panel in hidden:
            panel.remove_class("-hidden")
        self.resizer.reset()
        self.call_after_refresh(self.refresh_panels)
        return bool(hidden)

    def _panels(self) -> list[Widget]:
        return [panel for panel in self.query("*") if isinstance(panel, Panel | ScrollPanel) and panel.can_focus]

    # ---- the mouse on borders --------------------------------------------------------------------------------------
    def on_mouse_down(self, event: events.MouseDown) -> None:
        self.resizer.take(event.screen_x, event.screen_y)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self.resizer.move(event.screen_x, event.screen_y):
            self.call_after_refresh(self.refresh_panels)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        self.resizer.let_go()
