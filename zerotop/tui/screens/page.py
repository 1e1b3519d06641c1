"""A screen behind a number key: the header, one page (two in a wide terminal), the commands and the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Input

from zerotop.tui.abilities import filterable
from zerotop.tui.keys import TABS_FROM
from zerotop.tui.pages.base import Page
from zerotop.tui.panels.header import Header
from zerotop.tui.panels.strip import CommandStrip
from zerotop.tui.panels.tabs import TabLine
from zerotop.tui.panels.verdict import VerdictLine
from zerotop.tui.screens.live import LiveScreen
from zerotop.tui.theme import Palette
from zerotop.tui.view import View
from zerotop.tui.widgets.keybar import KeyBar

ROOMY = 32
"""From this height on, a line is reserved for the commands."""
TALL = 44
"""From this height on, the verdict has two lines: one more for the rest of its sentence, or for what to do."""
TWO_FROM = 240
"""From this width on, two pages stand side by side."""


class FilterField(Input):
    """The input for the filter of a panel."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Keep this filter", show=True),
        Binding("escape", "app.back", "Clear it", show=True),
    ]


class PageScreen(LiveScreen):
    """The page that `key` opens."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "app.back", "Back", show=False)]

    def __init__(self, palette: Palette, key: str, pages: Mapping[str, Callable[[], Page]]) -> None:
        super().__init__()
        self.palette = palette
        self.key = key
        self.pages = pages
        self.page = pages[key]()
        self._filtered: Widget | None = None
        self._verdict, self._tabs, self._strip = (
            VerdictLine(id="verdict"),
            TabLine(key, id="tabs"),
            CommandStrip(id="strip"),
        )
        self._places = Horizontal(self.page, id="pages")

    def compose(self) -> ComposeResult:
        yield self._verdict
        yield Header(id="header")
        yield self._tabs
        yield self._places
        yield FilterField(id="filter")
        yield self._strip
        yield KeyBar(self.palette)

    def _pages(self) -> list[Page]:
        """The page, and in a wide terminal the one beside it."""
        return [child for child in self._places.children if isinstance(child, Page) and child.is_mounted]

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        first = self.page.first_focus()
        if first is not None:
            first.focus()

    def show_view(self, view: View) -> None:
        for page in self._pages():
            if page.display:
                page.show_view(view)
        super().show_view(view)
        self.fit()

    def on_resize(self) -> None:
        super().on_resize()
        self._companion()
        self.fit()

    def _companion(self) -> None:
        """Mount the second page when there is room for it, and hide it when there is not any more."""
        there = [page for page in self.query(Page) if page is not self.page]
        wide = self.size.width >= TWO_FROM
        if wide and not there:
            self._places.mount(self.pages[self.page.COMPANION]())
        for page in there:
            if page.display != wide:
                page.display = wide
                self.call_after_refresh(self.refresh_panels)

    def on_page_ready(self) -> None:
        """A page has been mounted: its panels are drawn, too."""
        self.forget_panels()
        self.refresh_panels()

    def fit(self) -> None:
        """Give the bands above and below the pages their lines."""
        verdict, tabs, strip = self._verdict, self._tabs, self._strip
        if not (verdict.is_attached and tabs.is_attached and strip.is_attached):
            return  # a last tick or resize, while the app takes its panels down one by one
        height, narrow = self.size.height, self.has_class("-narrow")
        verdict.reserve(2 if height >= TALL else 1)
        strip.reserve(int(not narrow and height >= ROOMY))
        if tabs.display != (height >= TABS_FROM):
            tabs.display = height >= TABS_FROM
        for page in self._pages():
            page.fit()

    # ---- the filter ------------------------------------------------------------------------------------------------
    def filter_target(self) -> Widget | None:
        """The panel that `/` filters: the one with the focus, else the last one that can be filtered (the events)."""
        if filterable(self.focused) is not None:
            return self.focused
        there = [panel for panel in self.page.query("*") if filterable(panel) is not None and panel.display]
        return there[-1] if there else None

    def open_filter(self) -> None:
        """Show the filter field."""
        field, target = self.query_one(FilterField), self.filter_target()
        panel = filterable(target)
        if panel is None:
            return
        self._filtered = target
        if self.maximized is not None and self.maximized is not target:
            self.unzoom()  # what is being filtered should be in sight
        with self.prevent(Input.Changed):
            field.value = panel.filter
        field.placeholder = panel.FILTER_HINT
        field.display = True
        self.set_focus(field)
        self.fit()

    def close_filter(self) -> bool:
        """Esc: True if there was a filter or its field to remove."""
        field = self.query_one(FilterField)
        target = self._filtered if field.display else self._with_filter()
        panel = filterable(target)
        if panel is None:
            return False
        with self.prevent(Input.Changed):
            field.value = ""
        field.display = False
        panel.set_filter("")
        self.set_focus(target)
        self.fit()
        return True

    def _with_filter(self) -> Widget | None:
        """A panel that is filtered, the focused one first."""
        there = [self.focused, *self.page.query("*")]
        return next((one for one in there if (panel := filterable(one)) is not None and panel.filter), None)

    @on(Input.Changed, "#filter")
    def _filter_changed(self, message: Input.Changed) -> None:
        if (panel := filterable(self._filtered)) is not None:
            panel.set_filter(message.value)

    @on(Input.Submitted, "#filter")
    def _filter_kept(self) -> None:
        self.query_one(FilterField).display = False
        if self._filtered is not None:
            self.set_focus(self._filtered)
        self.fit()
