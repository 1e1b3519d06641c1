"""What the palette (Ctrl+P) offers: the actions of the keys, as far as they are possible now, and the themes."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from textual.app import SystemCommand
from textual.screen import Screen

from zerotop.tui.keys import KEYS
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.screens.texts import TextScreen
from zerotop.tui.theme import Palette

if TYPE_CHECKING:
    from zerotop.tui.pages.data import DataPage

DATA = "8"


class Actor(Protocol):
    """What the palette needs of the app."""

    palettes: dict[str, Palette]
    theme: str

    def may(self, action: str, screen: Screen[Any]) -> bool:
        """Whether an action makes sense while `screen` is on top."""

    def why_impossible(self, action: str) -> str:
        """Why the run's trainer can't do it; empty if it can."""

    async def action_back(self) -> None:
        """Esc."""


def palette_commands(app: Actor, screen: Screen[Any]) -> Iterable[SystemCommand]:
    """All commands that make sense while `screen` is on top."""
    for key in KEYS:
        name, arguments = parsed(key.action)
        if app.may(name, screen):
            why = app.why_impossible(name)  # choosing it says so, too
            text = f"⊘ {why}" if why else key.help
            yield SystemCommand(key.palette_title, text, partial(_act(app, name), *arguments))
    if isinstance(screen, PageScreen) and isinstance(screen.page, OverviewPage):
        yield SystemCommand("Open rank", "the selected rank in full", screen.page.ranks.action_open)
    if isinstance(screen, RankScreen):
        yield SystemCommand("Previous rank", "the rank before this one", partial(screen.action_other, -1))
        yield SystemCommand("Next rank", "the rank after this one", partial(screen.action_other, 1))
    if isinstance(screen, PageScreen) and screen.page.KEY == DATA:
        page = cast("DataPage", screen.page)
        yield SystemCommand("Previous example", "the example before this one", partial(page.action_other, -1))
        yield SystemCommand("Next example", "the example after this one", partial(page.action_other, 1))
    if isinstance(screen, TextScreen):
        yield SystemCommand("Earlier texts", "those of the evaluation before", partial(screen.action_other, -1))
        yield SystemCommand("Later texts", "those of the evaluation after", partial(screen.action_other, 1))
    yield SystemCommand("Back", "out of a rank, a zoomed panel, a filter", app.action_back)
    for name, palette in app.palettes.items():
        use = partial(setattr, app, "theme", name)
        yield SystemCommand(f"Theme: {palette.label}", f"use the theme {name}", use)


def parsed(action: str) -> tuple[str, tuple[Any, ...]]:
    """(name, arguments) of an action as keys.py writes it."""
    name, _, rest = action.partition("(")
    return name, (literal_eval(rest[:-1]),) if rest else ()


def _act(app: Actor, name: str) -> Callable[..., Any]:
    return getattr(app, f"action_{name}")  # type: ignore[no-any-return]
