"""Palettes: the themes of the package, and the user's own beside them.

A palette is a TOML file of colours. A user's file may give only what it changes; the rest comes from the built-in
palette of the same brightness. A file that can't be used is reported and skipped: a colour must never hide a run.
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.style import Style
from textual.color import Color, ColorParseError
from textual.css.stylesheet import Stylesheet
from textual.theme import Theme

from zerotop.rundir.paths import config_home

DEFAULT = "dark"
BAND = 0.55
"""How far the band of a plot is from its line's colour to the background."""
HEAT_LEVELS = 20
"""Colours of a heat map, less one: fewer change less often."""
SECTIONS = ("ui", "categories", "phases", "plots")


class ThemeError(ValueError):
    """A palette file that cannot be used; the message names the file, the problem and what is expected."""


class SteadyStylesheet(Stylesheet):
    """Keeps what it has parsed while the colours stay the same: Textual parses every rule again for each new screen and
    once more at the start."""

    def set_variables(self, variables: dict[str, str]) -> None:
        if variables != self._variables:
            super().set_variables(variables)
            self._require_parse = True

    def reparse(self) -> None:
        if self._require_parse:
            self.parse()


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, as "#rrggbb". Keys of each section are those of themes/dark.toml."""

    name: str
    label: str
    dark: bool
    ui: dict[str, str]
    categories: dict[str, str]
    phases: dict[str, str]
    plots: dict[str, str]

    def theme(self) -> Theme:
        """The theme for Textual."""
        ui = self.ui
        return Theme(
            name=self.name,
            dark=self.dark,
            primary=ui["primary"],
            secondary=ui["secondary"],
            accent=ui["accent"],
            success=ui["success"],
            warning=ui["warning"],
            error=ui["error"],
            foreground=ui["foreground"],
            background=ui["background"],
            surface=ui["surface"],
            panel=ui["panel"],
            variables={"muted": ui["muted"], "line": ui["border"], "footer-background": ui["background"]},
        )

    def style(self, role: str, *, bold: bool = False, reverse: bool = False) -> Style:
        """Text in a colour of [ui]; `reverse` puts it on that colour instead."""
        return _style(self.ui[role], None if not reverse else self.ui["background"], bold, reverse)

    def category(self, name: str) -> Style:
        """A filled cell of a memory category."""
        return _block(self.categories.get(name, self.categories["other"]))

    def phase(self, name: str) -> Style:
        """A filled cell of a phase."""
        return _block(self.phases.get(name, self.phases["idle"]))

    def waiting(self, name: str) -> Style:
        """The hatching of the part of a phase in which the thread waited."""
        return _hatched(self.phases.get(name, self.phases["idle"]), self.ui["background"])

    def phase_text(self, name: str) -> Style:
        """The colour of a phase as text. Its name is always beside it. Fills of quiet phases are too dim for text."""
        if name in {"paused", "init", "idle"}:
            return self.style("warning" if name == "paused" else "muted")
        return _style(
            self.phases[name] if self.dark and name in self.phases else self.ui["foreground"], None, False, False
        )

    def heat(self, heat: float) -> Style:
        """A filled cell between calm (0) and alarming (1), in one of HEAT_LEVELS + 1 colours."""
        level = round(max(0.0, min(1.0, heat)) * HEAT_LEVELS)
        return _heated(level, self.ui["panel"], self.ui["primary"], self.ui["warning"], self.ui["error"])

    def plot_band(self, name: str) -> Style:
        """The range of the values behind a plot's line: its colour, nearer to the background."""
        return _style(_between(self.plots.get(name, self.ui["primary"]), self.ui["background"]), None, False, False)

    def plot(self, name: str) -> Style:
        """The line of a plot."""
        return _style(self.plots.get(name, self.ui["primary"]), None, False, False)


@cache
def _style(color: str, other: str | None, bold: bool, reverse: bool) -> Style:
    return Style(color=other, bgcolor=color, bold=bold) if reverse else Style(color=color, bold=bold)


@cache
def _between(color: str, ground: str) -> str:
    return Color.parse(color).blend(Color.parse(ground), BAND).hex6


@cache
def _heated(level: int, ground: str, tint: str, warning: str, error: str) -> Style:
    """Calm is a tint of the ground, so that a warning and an error stand out from it."""
    calm = Color.parse(ground)
    stops = (
        (0.0, calm),
        (0.6, calm.blend(Color.parse(tint), 0.6)),
        (0.75, Color.parse(warning)),
        (1.0, Color.parse(error)),
    )
    share = level / HEAT_LEVELS
    (start, low), (end, high) = next(pair for pair in pairwise(stops) if share <= pair[1][0])
    return _block(low.blend(high, (share - start) / (end - start)).hex6)


@cache
def _hatched(color: str, ground: str) -> Style:
    return Style(color=color, bgcolor=Color.parse(color).blend(Color.parse(ground), 0.8).hex6)


@cache
def _block(color: str) -> Style:
    """A filled cell whose letter is black or white, whichever is readable on it."""
    ink = Color.parse(color).get_contrast_text(1.0)
    return Style(color=ink.rich_color, bgcolor=color)


def load_palettes() -> tuple[dict[str, Palette], list[str]]:
    """All palettes by name, built-in ones first, and one line for each user file that was skipped."""
    palettes: dict[str, Palette] = {}
    order = {f"{DEFAULT}.toml": 0, "light.toml": 1}
    for item in sorted(_builtin_files(), key=lambda item: (order.get(item.name, 2), item.name)):
        palette = read_palette(item, None)
        palettes[palette.name] = palette
    problems: list[str] = []
    bases = {palette.dark: palette for palette in reversed(palettes.values())}
    for path in user_files():
        try:
            palettes[path.stem] = read_palette(path, bases)
        except ThemeError as error:
            problems.append(str(error))
    return palettes, problems


def user_files() -> dict[Path, int]:
    """The user's palettes, and when each was written last (ns)."""
    found = {}
    for path in sorted(user_folder().glob("*.toml")):
        with suppress(OSError):  # it is being replaced
            found[path] = path.stat().st_mtime_ns
    return found


def user_folder() -> Path:
    """The folder of the user's palettes."""
    return config_home() / "themes"


def _builtin_files() -> list[Traversable]:
    # In a source tree the palettes lie beside the package, and what a build once copied may be old.
    source = Path(__file__).parents[2]
    folder: Traversable = source / "themes" if (source / "pyproject.toml").is_file() else files("zerotop") / "themes"
    return [item for item in folder.iterdir() if item.name.endswith(".toml")]


def read_palette(path: Path | Traversable, bases: dict[bool, Palette] | None) -> Palette:
    """The palette in `path`; keys that it leaves out come from `bases[dark]`. Raises ThemeError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ThemeError(f"theme {path}: {error}") from None
    dark = data.pop("dark", True)
    name = path.name.removesuffix(".toml")
    label = data.pop("label", name)
    if not isinstance(dark, bool) or not isinstance(label, str):
        raise ThemeError(f"theme {path}: `dark` must be true or false, and `label` a text")
    base = bases[dark] if bases else None
    if unknown := sorted(set(data) - set(SECTIONS)):
        raise ThemeError(f"theme {path}: unknown key {unknown[0]!r}; expected label, dark, {', '.join(SECTIONS)}")
    colors = {section: _section(path, section, data.get(section, {}), base) for section in SECTIONS}
    return Palette(name, label, dark, **colors)


def _section(path: Path | Traversable, section: str, given: Any, base: Palette | None) -> dict[str, str]:
    colors: dict[str, str] = dict(getattr(base, section)) if base else {}
    if not isinstance(given, dict):
        raise ThemeError(f"theme {path}: {section} must be a table of colours, [{section}]")
    for key, value in given.items():
        if base and key not in colors:
            raise ThemeError(f"theme {path}: unknown key {section}.{key}; expected one of {', '.join(colors)}")
        try:
            colors[key] = Color.parse(value).hex6.lower()
        except (ColorParseError, TypeError):
            raise ThemeError(
                f'theme {path}: {section}.{key} = {value!r} is not a colour; write it as "#rrggbb"'
            ) from None
    return colors
