"""Ctrl+P: all actions and themes by name."""

from __future__ import annotations

from typing import ClassVar

from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.command import CommandList, CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.widgets import OptionList

from zerotop.tui.text import plain

PAGE = 10


def turn_page(options: OptionList, pages: int) -> None:
    """Move the highlight by whole pages.

    OptionList's own action reads where each option was drawn, which fails while a list was just filled and not drawn
    yet.
    """
    if options.option_count:
        options.highlighted = min(options.option_count - 1, max(0, (options.highlighted or 0) + pages * PAGE))


class ActionProvider(Provider):
    """The app's system commands. Titles are shown as they are: a user's theme may have any name."""

    async def discover(self) -> Hits:
        for title, help_text, act, _ in sorted(
            self.app.get_system_commands(self.screen), key=lambda command: command.title
        ):
            yield DiscoveryHit(plain(title), act, text=title, help=plain(help_text))  # type: ignore[arg-type]

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for title, help_text, act, _ in self.app.get_system_commands(self.screen):
            score, offsets = matcher.fuzzy_search.match(query, title)
            if score > 0:
                shown = plain(title)
                for offset in offsets:
                    shown = shown.stylize(matcher.match_style, offset, offset + 1)
                yield Hit(score, shown, act, text=title, help=plain(help_text))  # type: ignore[arg-type]


class ActionPalette(CommandPalette):
    """The palette of all actions."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "turn_page(-1)", "Previous page", show=False),
        Binding("pagedown", "turn_page(1)", "Next page", show=False),
    ]

    def __init__(self) -> None:
        super().__init__([ActionProvider], id="--command-palette")

    def dismiss(self, result: None = None) -> AwaitComplete:
        # Textual does not stop these timers. They query the list, which may be gone by the time they fire.
        self._stop_no_matches_countdown()
        self._stop_busy_countdown()
        return super().dismiss(result)

    def action_turn_page(self, pages: int) -> None:
        """Move the highlight by whole pages."""
        turn_page(self.query_one(CommandList), pages)
