"""What the keys of screens, panels and plots do."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from zerotop.tui.abilities import Figured, Zoomable, figured, zoomable
from zerotop.tui.keyflow import KeyFlow
from zerotop.tui.keys import PAGE_NAMES
from zerotop.tui.lens import Lens
from zerotop.tui.pages.base import Page
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.panels.plots import PlotPanel
from zerotop.tui.panels.rank_grid import RankGrid
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.texts import TextScreen
from zerotop.tui.theme import Palette
from zerotop.tui.widgets.lines import Panel, ScrollPanel

if TYPE_CHECKING:
    from zerotop.tui.panels.log import LogPanel

ReturnType = TypeVar("ReturnType")
Found = TypeVar("Found", bound=Widget)
_MODULES = {
    "2": ("memory", "MemoryPage"),
    "3": ("timeline", "TimelinePage"),
    "4": ("communication", "CommunicationPage"),
    "5": ("training", "TrainingPage"),
    "6": ("logs", "LogPage"),
    "7": ("settings", "SettingsPage"),
    "8": ("data", "DataPage"),
}


def _page(key: str) -> Page:
    """A new page. Others than the first are imported when they are first opened: the first paint comes before."""
    if key == OverviewPage.KEY:
        return OverviewPage()
    module, name = _MODULES[key]
    page = getattr(importlib.import_module(f"zerotop.tui.pages.{module}"), name)()
    assert isinstance(page, Page)
    return page


def import_pages() -> None:
    """Import all of them, so that opening one is quick. Call it in a thread, after the first paint."""
    for module, _ in _MODULES.values():
        importlib.import_module(f"zerotop.tui.pages.{module}")


PRELOAD_S = 1.5
"""So long after the start the pages are imported."""
HOLD_S = 0.005
"""For so long a switch to a screen that is there draws nothing."""
PAGES: Mapping[str, Callable[[], Page]] = {key: partial(_page, key) for key in PAGE_NAMES}
OVERVIEW, TIMELINE, COMMUNICATION, TRAINING, LOGS, DATA = "1", "3", "4", "5", "6", "8"
FIRST = "1"
LOG_ACTIONS = frozenset({"level", "log_rank", "match", "matches", "wrap", "copy_line"})
RANK_ACTIONS = frozenset({"sort", "reverse", "grid"})
AXIS_ACTIONS = frozenset({"zoom_axis", "zoom_all", "cursor", "pan"})
LENS_ACTIONS = frozenset({"log_scale", "smooth", "overlay"})
PANEL_ACTIONS = frozenset({"zoom", "hide", "unhide", "freeze"})


def mode_of(key: str) -> str:
    """The name of the mode of a number key: each screen has a stack of its own, and hidden ones do nothing."""
    return f"screen-{key}"


class PageKeys(KeyFlow[ReturnType]):
    """The number keys, and the keys that act on what a screen shows."""

    lens: Lens
    _hold_s = math.inf
    """The longest time for which a switch of screens may draw nothing."""

    @property
    def palette(self) -> Palette:
        """The colours of the current theme."""
        raise NotImplementedError

    def update_view(self) -> None:
        """Draw the current view."""
        raise NotImplementedError

    def add_pages(self) -> None:
        """Make the number keys known."""
        for key in PAGES:
            if mode_of(key) not in self._modes:
                self.add_mode(mode_of(key), partial(self._make_page, key))

    def _make_page(self, key: str) -> Screen[Any]:
        return PageScreen(self.palette, key, PAGES)

    # ---- screens ---------------------------------------------------------------------------------------------------
    def delay_update(self, delay: float = 0.05) -> None:
        """Textual holds back what a switch of screens draws, so that a new one can settle. One that is there already
        needs only the messages that the switch has caused."""
        super().delay_update(min(delay, self._hold_s))

    def action_page(self, key: str) -> None:
        """1 to 8: open a screen."""
        if self.current_mode == mode_of(key):
            while len(self.screen_stack) > 1:
                self.pop_screen()
        else:
            self._hold_s = HOLD_S if mode_of(key) in self._screen_stacks else math.inf
            self.switch_mode(mode_of(key))
            self._hold_s = math.inf
        self.screen.set_class(self.is_frozen, "-frozen")
        self.call_after_refresh(self.update_view)

    def action_open_panel(self) -> None:
        """Enter, in a panel without lines to open: the screen that its title names."""
        if isinstance(self.focused, Panel | ScrollPanel) and (key := self.focused.opens):
            self.action_page(key)

    @property
    def is_frozen(self) -> bool:
        """Whether the view is frozen."""
        raise NotImplementedError

    def action_data(self) -> None:
        """d: what is trained on; on that screen, switch between training and evaluation data."""
        page = self.page
        if page is not None and page.KEY == DATA:
            page.next_role()
            self.update_view()
        else:
            self.action_page(DATA)

    def action_texts(self) -> None:
        """w: what the model writes at evaluations."""
        if not isinstance(self.screen, TextScreen):
            self.open_over(TextScreen(self.palette))

    def open_over(self, screen: LiveScreen) -> None:
        """Show a screen over the current page, instead of another one."""
        if len(self.screen_stack) > 1 and isinstance(self.screen, LiveScreen):
            self.switch_screen(screen)
        else:
            self.push_screen(screen)
        screen.set_class(self.is_frozen, "-frozen")
        self.call_after_refresh(self.update_view)

    @property
    def page(self) -> Page | None:
        """The page on top; None if another screen is."""
        return self.screen.page if isinstance(self.screen, PageScreen) else None

    def _target(self, kind: type[Found]) -> Found | None:
        """The focused panel if it is of that kind, else the first one of the page that is shown."""
        if isinstance(self.focused, kind):
            return self.focused
        page = self.page
        there = list(page.query(kind)) if page is not None and page.is_mounted else []
        return next((panel for panel in there if panel.display), None)

    def _axis(self) -> Zoomable | None:
        """What zoom, pan and cursor act on."""
        if (focused := zoomable(self.focused)) is not None:
            return focused
        there = self.page.query("*") if self.page is not None else ()
        return next((zoomable(panel) for panel in there if zoomable(panel) is not None and panel.display), None)

    def _with_figures(self) -> Figured | None:
        """The focused panel if it has several figures, else the first one of the page that has."""
        if (focused := figured(self.focused)) is not None:
            return focused
        there = self.page.query("*") if self.page is not None else ()
        return next((figured(panel) for panel in there if figured(panel) is not None and panel.display), None)

    def _log_panel(self) -> LogPanel | None:
        """The log of the page of logs."""
        found = self.page.query("LogPanel") if self.page is not None and self.page.is_mounted else ()
        return next((cast("LogPanel", panel) for panel in found), None)

    def page_may(self, action: str, screen: Screen[Any]) -> bool:
        """Whether an action on what the screen shows makes sense while `screen` is on top."""
        if action in {"page", "texts", "data"} or action in PANEL_ACTIONS:
            return isinstance(screen, LiveScreen) and not (action == "texts" and isinstance(screen, TextScreen))
        if not isinstance(screen, PageScreen):
            return action not in (LOG_ACTIONS | RANK_ACTIONS | AXIS_ACTIONS | LENS_ACTIONS | {"filter", "next_figure"})
        if action == "filter":
            return screen.filter_target() is not None and not isinstance(screen.focused, Input)
        key = screen.page.KEY
        if action in LOG_ACTIONS:
            return key == LOGS
        if action in RANK_ACTIONS:
            return key == OVERVIEW
        if action == "next_figure":
            return key in {OVERVIEW, COMMUNICATION}
        if action in AXIS_ACTIONS:
            return key in {OVERVIEW, TRAINING, COMMUNICATION, TIMELINE}
        return action not in LENS_ACTIONS or key in {OVERVIEW, TRAINING}

    # ---- panels ----------------------------------------------------------------------------------------------------
    def action_sort(self) -> None:
        """s: sort the ranks by the next column."""
        if (ranks := self._ranks()) is not None:
            ranks.next_sort()

    def action_reverse(self) -> None:
        """r: turn the order of the ranks round."""
        if (ranks := self._ranks()) is not None:
            ranks.reverse_sort()

    def action_grid(self) -> None:
        """x: the ranks as a grid, or as a table."""
        if isinstance(self.page, OverviewPage):
            self.page.switch_ranks()
            self.update_view()

    def _ranks(self) -> RankTable | RankGrid | None:
        """What shows the ranks of the overview."""
        return self.page.ranks if isinstance(self.page, OverviewPage) else None

    def action_filter(self) -> None:
        """/: filter events or ranks, search the log."""
        if isinstance(self.screen, PageScreen):
            self.screen.open_filter()

    def action_zoom(self) -> None:
        """z: the focused panel takes the whole screen, or gives it back."""
        screen = self.screen
        if isinstance(screen, LiveScreen) and not screen.unzoom() and self.focused is not None:
            screen.zoom(self.focused)

    def action_hide(self) -> None:
        """h: hide the focused panel."""
        if isinstance(self.screen, LiveScreen) and not self.screen.hide_focused():
            self.notify("the last panel of a screen stays", timeout=3)

    def action_unhide(self) -> None:
        """u: show all panels, in their usual sizes."""
        if isinstance(self.screen, LiveScreen) and not self.screen.show_all():
            self.notify("no panel is hidden", timeout=3)

    def action_next_figure(self) -> None:
        """g: the next figure in a plot or heat map."""
        if (panel := self._with_figures()) is not None:
            panel.next_figure()

    # ---- log -------------------------------------------------------------------------------------------------------
    def action_level(self) -> None:
        """v: all lines but those of progress, all, or from the next level on."""
        if (log := self._log_panel()) is not None:
            log.next_level()

    def action_log_rank(self) -> None:
        """i: the records of the next rank."""
        if (log := self._log_panel()) is not None:
            log.next_rank(1, self.rank_count)

    @property
    def rank_count(self) -> int:
        """The number of ranks."""
        raise NotImplementedError

    def action_match(self, by: int) -> None:
        """n and p: another match of the search."""
        if (log := self._log_panel()) is not None:
            log.next_match(by)
            if not log.filter:
                self.notify("nothing is searched for: / searches", timeout=3)

    def action_matches(self) -> None:
        """m: only lines that match, or all."""
        if (log := self._log_panel()) is not None:
            log.toggle_matches()

    def action_wrap(self) -> None:
        """b: wrap long lines, or cut them."""
        if (log := self._log_panel()) is not None:
            log.toggle_wrap()

    def action_copy_line(self) -> None:
        """y: the marked line, or the newest in sight, to the clipboard of the terminal."""
        if (log := self._log_panel()) is not None and (text := log.line_to_copy()):
            self.copy_to_clipboard(text)
            self.notify("copied, if the terminal allows it (OSC 52)", timeout=3)

    # ---- plots -----------------------------------------------------------------------------------------------------
    def action_zoom_axis(self, factor: float) -> None:
        """+ and -: show fewer steps, or more."""
        if (axis := self._axis()) is not None:
            axis.zoom_by(factor)

    def action_pan(self, share: float) -> None:
        """Shift with an arrow: earlier or later steps."""
        if (axis := self._axis()) is not None:
            axis.pan_by(share)

    def action_cursor(self, by: int) -> None:
        """Arrows: move the cursor."""
        if (axis := self._axis()) is not None:
            axis.move_cursor(by)

    def action_zoom_all(self) -> None:
        """0: all steps, without a cursor."""
        if (axis := self._axis()) is not None:
            axis.show_whole()

    def action_log_scale(self) -> None:
        """l: logarithmic values, or linear."""
        self.set_lens(replace(self.lens, log=not self.lens.log))

    def action_smooth(self) -> None:
        """a: smoothed lines, or the values as they are."""
        self.set_lens(replace(self.lens, smooth=not self.lens.smooth))

    def action_overlay(self) -> None:
        """o: earlier runs, or not."""
        self.set_lens(replace(self.lens, overlay=not self.lens.overlay))

    def set_lens(self, lens: Lens) -> None:
        """Show other steps, or another cursor, in all plots."""
        if lens != self.lens:
            self.lens = lens
            self.update_view()

    def on_plot_panel_lens_changed(self, message: PlotPanel.LensChanged) -> None:
        self.set_lens(message.lens)
