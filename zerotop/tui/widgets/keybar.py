"""The footer: the keys that work now, the most important first; `?` shows those that do not fit."""

from __future__ import annotations

from rich.cells import cell_len
from rich.style import Style
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from zerotop.tui.theme import Palette
from zerotop.tui.widgets.lines import PLAIN, Row


class KeyBar(Widget):
    """Shows the active bindings with `show=True`, in order; each can be clicked. Follows remapped keys by itself."""

    DEFAULT_CSS = "KeyBar { dock: bottom; height: 1; }"

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.palette = palette
        self._labels: dict[str, str] = {}
        self._note = ""
        self._note_timer: Timer | None = None

    def relabel(self, labels: dict[str, str]) -> None:
        """Action -> what its key does now, where that differs from the binding's description."""
        if labels != self._labels:
            self._labels = labels
            self.refresh()

    def note(self, text: str, seconds: float = 2.0) -> None:
        """Show a short text at the right end for a moment."""
        if self._note_timer is not None:
            self._note_timer.stop()
        self._note = text
        self._note_timer = self.set_timer(seconds, lambda: self.note("")) if text else None
        self.refresh()

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.refresh())

    def render_line(self, y: int) -> Strip:
        whole = self.size.width
        width = whole - (cell_len(self._note) + 2 if self._note else 0)
        row = Row()
        seen: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if not binding.show or not active.enabled or binding.action in seen:
                continue
            seen.add(binding.action)
            label = self._labels.get(binding.action, binding.description)
            key = self.app.get_key_display(binding).replace("enter", "Enter").replace("esc", "Esc")
            if row.width + len(key) + len(label) + 3 > width:
                continue
            owner = "app." if active.node is self.app else "screen." if active.node is self.screen else ""
            click = Style(meta={"@click": binding.action if "." in binding.action else owner + binding.action})
            row.gap().add(key, self.palette.style("accent", bold=True) + click)
            row.gap().add(label, self.palette.style("muted") + click).gap()
        if self._note:
            row.to(width).gap().add(self._note, self.palette.style("primary"))
        return row.strip(whole, PLAIN).apply_style(self.rich_style)
