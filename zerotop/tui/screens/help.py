"""All keys and what they do, the columns of the rank table, and the glyphs."""

from __future__ import annotations

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from zerotop.rundir.paths import config_home
from zerotop.state.waits import WINDOW_STEPS
from zerotop.tui.keys import KEYS, OTHER_HELP
from zerotop.tui.text import STATES, plain
from zerotop.tui.theme import Palette


class HelpScreen(ModalScreen[None]):
    """The help. `why_not` says why the keys that act on the run do not work now."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark", "leave", "Back")]

    def __init__(self, palette: Palette, keys: dict[str, str], can_steer: bool, why_not: str) -> None:
        super().__init__()
        self.palette = palette
        self.keys = keys
        """Key id -> the key that this user has set."""
        self.can_steer = can_steer
        self.why_not = why_not

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog help") as dialog:
            dialog.border_title = plain("keys")
            dialog.border_subtitle = plain("Esc goes back")
            yield Static(self._table())

    def _table(self) -> Table:
        accent, muted = self.palette.style("accent", bold=True), self.palette.style("muted")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()

        def head(text: str) -> None:
            table.add_row("", "")
            table.add_row(Text(text, self.palette.style("primary", bold=True)), "")

        table.add_row(
            Text("the run", self.palette.style("primary", bold=True)),
            Text("" if self.can_steer else self.why_not, muted),
        )
        for key in (key for key in KEYS if key.steers):
            table.add_row(
                Text(self.keys[key.id], accent if self.can_steer else muted),
                Text(key.help, "" if self.can_steer else muted),
            )
        head("the screen")
        for key in (key for key in KEYS if not key.steers):
            table.add_row(Text(self.keys[key.id], accent), Text(key.help))
        for name, text in OTHER_HELP:
            table.add_row(Text(name, accent), Text(text))
        head("one rank")
        table.add_row(Text("[ ]", accent), Text("the rank before, the next one"))
        head("columns and signs")
        table.add_row(Text("run"), Text("  ".join(f"{glyph} {name}" for name, (glyph, _) in STATES.items())))
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
        table.add_row(
            Text("GPU alarm"),
            Text("once a GPU has been out of order: throttled, memory errors, a slow link, lost; figures: Enter"),
        )
        head("your own")
        table.add_row(Text("themes"), Text(f"{config_home() / 'themes'}/NAME.toml: a palette; see themes/dark.toml"))
        table.add_row(Text("keys"), Text(f'{config_home() / "keys.toml"}: lines like  freeze = "F"  with these names:'))
        table.add_row("", Text(", ".join(key.id for key in KEYS), muted))
        return table

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss(None)
