"""The number keys and the screens that they open, in one line."""

from __future__ import annotations

from rich.style import Style
from textual import events

from zerotop.tui.keys import PAGE_NAMES
from zerotop.tui.view import View
from zerotop.tui.widgets.lines import Panel, Row


class TabLine(Panel):
    """The current screen is set off; a click opens another one."""

    ALLOW_MAXIMIZE = False
    READS = ()

    def __init__(self, key: str, *, id: str) -> None:
        super().__init__(id=id)
        self.key = key
        self._places: list[tuple[int, int, str]] = []

    def draw(self, view: View, width: int, height: int) -> list[Row]:
        palette = view.palette
        row = Row().gap()
        self._places = []
        full = sum(len(name) + 4 for name in PAGE_NAMES.values()) + 1 <= width
        for key, name in PAGE_NAMES.items():
            here = key == self.key
            word = name if full or here else name[: max(3, (width - 30) // 8)]
            start = row.width
            number = palette.style("accent", bold=True)
            text = palette.style("primary", bold=True) + Style(underline=True) if here else palette.style("muted")
            row.add(f" {key} ", number).add(f"{word} ", text)
            self._places.append((start, row.width, key))
        return [row]

    def on_click(self, event: events.Click) -> None:
        for start, end, key in self._places:
            if start <= event.x < end:
                self.app.action_page(key)  # type: ignore[attr-defined]
