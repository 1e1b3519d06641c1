"""The footer: the keys that work now, the most important first; `?` shows those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from zerotop.tui.keys import PAGE_NAMES, TABS_FROM, YIELDS
from zerotop.tui.theme import Palette
from zerotop.tui.widgets.lines import PLAIN, Row, changed_cells

LONG_FROM = 170
"""From this width on, the keys that act on the run say at which step they do."""


@dataclass(frozen=True)
class _Entry:
    """A key in the footer. click: the action with its namespace."""

    action: str
    key: str
    label: str
    click: str

    @property
    def width(self) -> int:
        return len(self.key) + len(self.label) + 3


class KeyBar(Widget):
    """Shows the active bindings with `show=True`, in order; each can be clicked. Follows remapped keys by itself."""

    DEFAULT_CSS = "KeyBar { dock: bottom; height: 1; }"

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.palette = palette
        self._labels: Mapping[str, str] = {}
        self._long: Mapping[str, str] = {}
        self._hidden: Set[str] = frozenset()
        self._greyed: Set[str] = frozenset()
        self._note = ""
        self._note_timer: Timer | None = None
        self._keys: list[_Entry] | None = None
        """The keys that work now, with their usual labels; None: to be looked up."""
        self._shown: Strip | None = None

    def relabel(
        self,
        labels: Mapping[str, str],
        hidden: Set[str] = frozenset(),
        long: Mapping[str, str] | None = None,
        greyed: Set[str] = frozenset(),
    ) -> None:
        """labels: action -> what its key does now, where that differs from the binding's description; long: the same
        in more words, for a wide footer. hidden: actions that have nothing to show yet, whose keys take no room.
        greyed: those that the run can't do; their keys say why."""
        long = labels if long is None else long
        shown, before = (long, self._long) if self.size.width >= LONG_FROM else (labels, self._labels)
        changed = (shown, hidden, greyed) != (before, self._hidden, self._greyed)
        self._labels, self._hidden, self._long, self._greyed = labels, hidden, long, greyed
        if changed:
            self._repaint()

    def _repaint(self) -> None:
        """Draw the line again, and send what has changed in it: with every step that is most of the time a digit."""
        before = self._shown
        if before is None or not self.size.width:
            self.refresh()
            return
        after = self._make()
        if after != before:
            start, end = changed_cells(before, after)
            self.refresh(Region(start, 0, max(1, end - start), 1))

    def note(self, text: str, seconds: float = 2.0) -> None:
        """Show a short text at the right end for a moment."""
        if self._note_timer is not None:
            self._note_timer.stop()
        self._note = text
        self._note_timer = self.set_timer(seconds, lambda: self.note("")) if text else None
        self.renew()

    def renew(self) -> None:
        """Draw everything again: other keys work now, or the palette is another one."""
        self._keys = self._shown = None
        self.refresh()

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.renew())

    def on_resize(self) -> None:
        self.renew()

    def render_line(self, y: int) -> Strip:
        return self._make().apply_style(self.rich_style)

    def _make(self) -> Strip:
        whole = self.size.width
        width = whole - (cell_len(self._note) + 2 if self._note else 0)
        row = Row()
        for entry in _fitting(self._entries(), width):
            click = Style(meta={"@click": entry.click})
            grey = entry.action in self._greyed
            key, label = ("border", "border") if grey else ("accent", "muted")
            row.gap().add(entry.key, self.palette.style(key, bold=not grey) + click)
            row.gap().add(entry.label, self.palette.style(label) + click).gap()
        if self._note:
            row.to(width).gap().add(self._note, self.palette.style("primary"))
        self._shown = row.strip(whole, PLAIN)
        return self._shown

    def _entries(self) -> list[_Entry]:
        """The keys to show, with what they do now."""
        if self._keys is None:
            self._keys = self._working_keys()
        labels = self._long if self.size.width >= LONG_FROM else self._labels
        kept = [entry for entry in self._keys if entry.action not in self._hidden]
        leave = next((at for at, entry in enumerate(kept) if entry.action == "detach"), None)
        if self.screen.size.height < TABS_FROM and leave is not None:  # elsewhere a line of tabs shows them
            kept.insert(leave + 1, _Entry("page", f"1-{len(PAGE_NAMES)}", "Screens", "app.page('2')"))
        return [replace(one, label=labels[one.action]) if one.action in labels else one for one in kept]

    def _working_keys(self) -> list[_Entry]:
        found: dict[str, _Entry] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            name = binding.action
            if not binding.show or not active.enabled or name in found:
                continue
            key = self.app.get_key_display(binding).replace("enter", "Enter").replace("esc", "Esc")
            owner = "app." if active.node is self.app else "screen." if active.node is self.screen else ""
            click = name if "." in name else owner + name
            found[name] = _Entry(name, key, binding.description, click)
        return list(found.values())


def _fitting(entries: list[_Entry], width: int) -> list[_Entry]:
    """The entries that a line of this width has room for, in order."""
    place = {entry.action: at for at, entry in enumerate(entries)}

    def order(entry: _Entry) -> tuple[int, bool]:
        before = YIELDS.get(entry.action)
        return max(place[entry.action], place.get(before, 0) if before else 0), before is not None

    chosen, used = set(), 0
    for entry in sorted(entries, key=order):
        if used + entry.width <= width:
            chosen.add(entry.action)
            used += entry.width
    return [entry for entry in entries if entry.action in chosen]
