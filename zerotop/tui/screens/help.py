"""All keys and what they do, the columns of the rank table, and the glyphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from zerotop.rundir.paths import config_home
from zerotop.state.waits import WINDOW_STEPS
from zerotop.tui.keys import GROUPS, KEYS, OTHER_HELP
from zerotop.tui.keys import Group as KeyGroup
from zerotop.tui.panels.rank_grid import SIGNS
from zerotop.tui.text import MARKS, STATES, plain
from zerotop.tui.theme import Palette

TWO_COLUMNS_FROM = 170
"""From this width of the terminal on, everything stands in two columns."""


class HelpScreen(ModalScreen[None]):
    """The help. `why_not` says why the keys that act on the run do not work now; `impossible`, by action, why the run's
    trainer can't do what some of them ask for."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark", "leave", "Back"),
        Binding("k", "scroll_by(-1)", show=False),
        Binding("j", "scroll_by(1)", show=False),
    ]

    def __init__(
        self,
        palette: Palette,
        keys: dict[str, str],
        can_steer: bool,
        why_not: str,
        impossible: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.palette = palette
        self.keys = keys
        """Key id -> the key that this user has set."""
        self.can_steer = can_steer
        self.why_not = why_not
        self.impossible = impossible or {}

    def compose(self) -> ComposeResult:
        wide = self.app.size.width >= TWO_COLUMNS_FROM
        with VerticalScroll(classes="dialog help" + (" wide" if wide else "")) as dialog:
            dialog.border_title = plain("keys")
            dialog.border_subtitle = plain("Esc goes back")
            if wide:
                with Horizontal():
                    yield Static(self._keys(("run", "screens", "view")))
                    yield Static(self._both(self._keys(("panels", "plots", "log")), self._signs()))
            else:
                yield Static(self._both(self._keys(tuple(GROUPS)), self._signs()))

    def _both(self, one: Table, other: Table) -> Group:
        return Group(one, other)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        return table

    def _head(self, table: Table, text: str, note: str = "") -> None:
        if table.row_count:
            table.add_row("", "")
        style = self.palette.style("primary", bold=True)
        table.add_row(Text(text, style), Text(note, self.palette.style("muted")))

    def _keys(self, groups: Sequence[KeyGroup]) -> Table:
        """The keys of these groups."""
        accent, muted = self.palette.style("accent", bold=True), self.palette.style("muted")
        table = self._table()
        if "run" in groups:
            self._first_rows(table)
        for group in groups:
            locked = group == "run" and not self.can_steer
            self._head(table, GROUPS[group], f"⊘ {self.why_not}" if locked else "")
            for key in (key for key in KEYS if key.group == group):
                why = "" if locked else self.impossible.get(key.action, "")
                grey = locked or bool(why)
                table.add_row(Text(self.keys[key.id], muted if grey else accent), Text(key.help, muted if grey else ""))
                if why:
                    table.add_row("", Text(f"⊘ {why}", muted))
            if group == "view":
                for name, text in OTHER_HELP:
                    table.add_row(Text(name, accent), Text(text))
        return table

    def _first_rows(self, table: Table) -> None:
        """Rows before all others; a screen with keys of its own adds them."""

    def _signs(self) -> Table:
        """Columns and signs, and the user's own files."""
        accent, muted = self.palette.style("accent", bold=True), self.palette.style("muted")
        table = self._table()
        self._head(table, "")
        self._head(table, "one rank")
        table.add_row(Text("[ ]", accent), Text("the rank before, the next one"))
        self._head(table, "columns and signs")
        table.add_row(Text("run"), Text("  ".join(f"{glyph} {name}" for name, (glyph, _) in STATES.items())))
        table.add_row(Text("on an axis"), Text("  ".join(f"{sign} {name}" for name, (sign, _) in MARKS.items())))
        table.add_row(Text("micro-steps"), Text("● done  ◐ current  ○ to come"))
        table.add_row(
            Text("wait per step"),
            Text(
                f"time for which the rank stood still for others in collectives; mean of the last {WINDOW_STEPS} steps"
            ),
        )
        table.add_row(
            Text("cost to others"),
            Text("time for which each other rank, on average, waited for this one, over the same steps"),
        )
        table.add_row(
            Text(""),
            Text("both also as a share of the step; the line that names a slow rank uses these steps", muted),
        )
        table.add_row(Text("grid of ranks"), Text("  ".join(f"{sign} {meaning}" for sign, meaning in SIGNS)))
        table.add_row(Text(""), Text("a digit in narrow cells: tenths of the way from calm to alarming", muted))
        table.add_row(
            Text("GPU alarm"),
            Text("once a GPU has been out of order: throttled, memory errors, a slow link, lost; figures: Enter"),
        )
        self._head(table, "your own")
        table.add_row(Text("themes"), Text(f"{config_home() / 'themes'}/NAME.toml: a palette; see themes/dark.toml"))
        table.add_row(Text("keys"), Text(f'{config_home() / "keys.toml"}: lines like  freeze = "F"  with these names:'))
        table.add_row("", Text(", ".join(key.id for key in KEYS), muted))
        return table

    def action_scroll_by(self, lines: int) -> None:
        """k and j: as the arrows."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss(None)
