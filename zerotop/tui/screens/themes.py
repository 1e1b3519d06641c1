"""The themes: what is marked is shown at once, and a user's file while it is being written."""

from __future__ import annotations

from typing import ClassVar, Protocol

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from zerotop.tui.text import plain
from zerotop.tui.theme import Palette, user_files, user_folder

LOOK_S = 0.5
"""How often the user's files are looked at while this dialog is open."""


class HasThemes(Protocol):
    """What the dialog needs of the app."""

    palettes: dict[str, Palette]
    theme: str

    def reload_palettes(self) -> list[str]:
        """Read all palettes again. Returns a line for each file that cannot be used."""


class ThemeList(OptionList):
    """The themes by name."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "cursor_up", show=False),
        Binding("j", "cursor_down", show=False),
    ]


class ThemeScreen(ModalScreen[None]):
    """Enter keeps the marked theme, Esc goes back to the one before."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "cancel", "Back")]

    def __init__(self, host: HasThemes) -> None:
        super().__init__()
        self.host = host
        self.before = host.theme
        self._files = user_files()

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog themes") as dialog:
            dialog.border_title = plain("theme")
            yield ThemeList(*self._options(), id="themes")
            yield Static(id="theme-note")
            yield Static(
                Content.from_markup("[b $accent]↑ ↓[/] try   [b $accent]Enter[/] keep   [b $accent]Esc[/] as before"),
                classes="choices",
            )

    def _options(self) -> list[Option]:
        return [Option(self._line(name, palette), id=name) for name, palette in self.host.palettes.items()]

    def _line(self, name: str, palette: Palette) -> Text:
        """The name, and what the colours look like."""
        text = Text(f"{palette.label:<24}")
        for category in ("parameters", "gradients", "optimizer", "activations"):
            text.append(f" {category[0].upper()} ", palette.category(category))
        text.append("  ")
        for role in ("success", "warning", "error"):
            text.append(f" {role} ", palette.style(role, reverse=True))
        return text

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        names = list(self.host.palettes)
        options.highlighted = names.index(self.host.theme) if self.host.theme in names else 0
        options.focus()
        self._note([])
        self.set_interval(LOOK_S, self.look)

    def _note(self, problems: list[str]) -> None:
        text = "\n".join(problems) or f"your own: {user_folder()}/NAME.toml, shown here as you save it"
        note = self.query_one("#theme-note", Static)
        note.update(plain(text))
        note.set_class(bool(problems), "bad")

    def look(self) -> None:
        """Show a file of the user's as soon as it is saved."""
        files = user_files()
        if files == self._files:
            return
        changed = [path.stem for path, at in files.items() if self._files.get(path) != at]
        self._files = files
        problems = self.host.reload_palettes()
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(self._options())
        names = list(self.host.palettes)
        wanted = next((name for name in changed if name in names), self.host.theme)
        options.highlighted = names.index(wanted) if wanted in names else 0
        self._note(problems)

    @on(OptionList.OptionHighlighted)
    def _try(self, message: OptionList.OptionHighlighted) -> None:
        self.host.theme = str(message.option.id)

    @on(OptionList.OptionSelected)
    def _keep(self) -> None:
        self.dismiss(None)

    def action_cancel(self) -> None:
        """Go back to the theme before."""
        self.host.theme = self.before
        self.dismiss(None)
