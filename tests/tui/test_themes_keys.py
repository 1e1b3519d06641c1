"""Themes, the user's own files, the help page."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from textual.binding import Binding
from textual.color import Color
from textual.command import CommandList, CommandPalette

import zerotop.tui
from tests.tui.screen_reading import OpenApp, head_text, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.state import material
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import FIXED_KEYS, KEYS, key_named, read_keymap
from zerotop.tui.pages.data import DataPage
from zerotop.tui.pages.logs import LogPage
from zerotop.tui.panels.lanes import LanePanel
from zerotop.tui.panels.memory_bars import MemoryBars
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.panels.settings import SettingTable
from zerotop.tui.screens.help import HelpScreen
from zerotop.tui.screens.page import PageScreen
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.screens.texts import TextScreen
from zerotop.tui.screens.themes import ThemeScreen
from zerotop.tui.theme import Palette, ThemeError, load_palettes, read_palette
from zerotop.tui.widgets.lines import ScrollPanel

PALETTES = list(load_palettes()[0].values())


@pytest.mark.parametrize("palette", PALETTES, ids=lambda palette: palette.name)
def test_text_can_be_read_on_every_palettes_background(palette: Palette) -> None:
    """WCAG 2 contrast: 4.5 for text, 3 for what is only secondary (https://www.w3.org/TR/WCAG22/#contrast-minimum)."""
    ground = Color.parse(palette.ui["background"])
    for role in ("foreground", "primary", "success", "warning", "error", "accent"):
        assert _contrast(Color.parse(palette.ui[role]), ground) >= 4.5, role
    for role in ("muted", "secondary"):
        assert _contrast(Color.parse(palette.ui[role]), ground) >= 3, role
    for name, fill in {**palette.categories, **palette.phases}.items():
        block = Color.parse(fill)
        assert _contrast(block.get_contrast_text(1.0), block) >= 3, name


def _contrast(one: Color, other: Color) -> float:
    def luminance(color: Color) -> float:
        parts = [c / 255 for c in color.rgb]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colour_blind_palette_tells_all_categories_apart_by_more_than_hue() -> None:
    palette = next(p for p in PALETTES if p.name == "colour-blind")
    values = list(palette.categories.values())
    assert len(set(values)) == len(values)
    ramp = list(palette.categories)
    for one, other in pairwise(ramp):
        first, second = Color.parse(palette.categories[one]), Color.parse(palette.categories[other])
        assert _contrast(first, second) >= 1.2, f"{one} and {other} stand side by side and are equally light"


async def test_t_shows_each_theme_as_it_is_marked_and_escape_brings_back_the_one_before(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        await pilot.press("t")
        await settle(app, pilot)
        seen = [app.theme]
        for _ in PALETTES[1:]:
            await pilot.press("down")
            await settle(app, pilot)
            seen.append(app.theme)
            assert app.screen_stack[0].styles.background == Color.parse(app.palette.ui["background"])
        assert seen == [palette.name for palette in PALETTES] and seen[:2] == ["dark", "light"]
        await pilot.press("escape")
        assert app.theme == "dark"
        await pilot.press("t", "down", "enter")
        await settle(app, pilot)
        assert app.theme == "light" and isinstance(app.screen, PageScreen)


async def test_a_theme_file_is_shown_as_it_is_saved_and_its_mistakes_are_told(
    open_app: OpenApp, no_user_files: Path
) -> None:
    async with open_app() as (app, pilot, _):
        await pilot.press("t")
        await settle(app, pilot)
        dialog = app.screen
        assert isinstance(dialog, ThemeScreen)
        file = no_user_files / "themes" / "mine.toml"
        file.write_text('label = "Mine"\n[ui]\nprimary = "#ff00ff"\n')
        dialog.look()
        await settle(app, pilot)
        assert app.theme == "mine" and app.palette.ui["primary"] == "#ff00ff"
        file.write_text('label = "Mine"\n[ui]\nprimary = "#00ffff"\n')
        os.utime(file, ns=(1, 1))
        dialog.look()
        await settle(app, pilot)
        assert app.palette.ui["primary"] == "#00ffff"
        file.write_text('label = "Mine"\n[ui]\nprimery = "#00ffff"\n')
        os.utime(file, ns=(2, 2))
        dialog.look()
        await settle(app, pilot)
        assert "unknown key ui.primery" in "\n".join(screen_text(app)) and app.theme == "dark"


async def test_a_theme_of_the_users_own_joins_and_a_broken_one_is_only_reported(
    open_app: OpenApp, no_user_files: Path
) -> None:
    folder = no_user_files / "themes"
    (folder / "mine.toml").write_text('label = "Mine"\n[ui]\nprimary = "#ff00ff"\n')
    (folder / "broken.toml").write_text('[ui]\nprimary = "no colour"\n')
    (folder / "worse.toml").write_text("not toml at all [")
    (folder / "typo.toml").write_text('[categories]\nparametres = "#ffffff"\n')
    async with open_app() as (app, pilot, _):
        assert "mine" in app.palettes and {"broken", "worse", "typo"}.isdisjoint(app.palettes)
        notes = "\n".join(str(note.message) for note in app._notifications)
        assert "broken.toml" in notes and 'write it as "#rrggbb"' in notes
        assert "worse.toml" in notes and "unknown key categories.parametres" in notes
        app.theme = "mine"
        await settle(app, pilot)
        assert app.palette.ui["primary"] == "#ff00ff"
        assert app.palette.categories == app.palettes["dark"].categories
        assert "running" in head_text(app)


def test_a_palette_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('ui = "dark"\n')
    with pytest.raises(ThemeError, match=r"must be a table of colours"):
        read_palette(tmp_path / "x.toml", {True: PALETTES[0]})


async def test_an_unknown_theme_in_the_environment_is_reported(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROTOP_THEME", "purple")
    async with open_app() as (app, _, _):
        assert app.theme == "dark"
        assert any("ZEROTOP_THEME=purple" in str(note.message) for note in app._notifications)


async def test_no_color_draws_only_greys(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    run = ScriptedRun(gpu=True)
    run.steps(5)
    async with open_app(run) as (app, _, _):
        assert app.no_color
        for widget in app.screen.query("RankTable, Header, MemoryPanel"):
            for strip in widget.render_lines(widget.size.region):
                for segment in strip:
                    for color in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                        if color is not None and color.triplet is not None:
                            assert len(set(color.triplet)) == 1
        assert "▶ running" in "\n".join(screen_text(app))


async def test_keys_can_be_given_other_keys(open_app: OpenApp, no_user_files: Path) -> None:
    (no_user_files / "keys.toml").write_text('checkpoint = "K"\n"screen.logs" = "9"\n')
    async with open_app(size=(200, 50)) as (app, pilot, run):
        await pilot.press("C")
        assert run.sent == []
        await pilot.press("K")
        assert [c.name for c in run.sent] == ["checkpoint"]
        assert "K Checkpoint" in "\n".join(screen_text(app))
        await pilot.press("9")
        assert isinstance(app.page, LogPage)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("Ctrl+Z", "ctrl+z"),
        ("F5", "f5"),
        ("Space", "space"),
        ("Alt+K", "alt+k"),
        ("asterisk", "*"),
        ("K", "K"),
        ("K,F5", "f5"),
    ],
)
async def test_keys_are_written_as_people_write_them(
    open_app: OpenApp, no_user_files: Path, written: str, key: str
) -> None:
    (no_user_files / "keys.toml").write_text(f'checkpoint = "{written}"\n')
    async with open_app() as (app, pilot, run):
        assert not app._notifications
        await pilot.press(key)
        assert [c.name for c in run.sent] == ["checkpoint"]


def test_every_key_of_panels_and_screens_is_kept_from_the_key_file() -> None:
    bound = [
        key_named(key)
        for owner in (
            RankTable,
            ScrollPanel,
            LanePanel,
            MemoryBars,
            SettingTable,
            PageScreen,
            RankScreen,
            DataPage,
            TextScreen,
        )
        for binding in owner.BINDINGS
        if isinstance(binding, Binding)
        for key in binding.key.split(",")
    ]
    assert set(bound) <= FIXED_KEYS and not FIXED_KEYS & {key_named(one) for key in KEYS for one in key.keys.split(",")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense [", "the default keys are used"),
        ('chekpoint = "K"', "unknown key 'chekpoint'"),
        ("checkpoint = 3", "checkpoint must be a key"),
        ('checkpoint = "P"', "'P' is both pause and checkpoint"),
        ('checkpoint = "question_mark"', "'?' is both help and checkpoint"),
        ('checkpoint = "Ctrl+Foo"', 'checkpoint = "Ctrl+Foo": no such key'),
        ('checkpoint = "Esc"', "that key has a fixed meaning"),
    ],
)
async def test_a_broken_key_file_is_reported_and_the_usual_keys_stay(
    open_app: OpenApp, no_user_files: Path, text: str, expected: str
) -> None:
    (no_user_files / "keys.toml").write_text(text)
    async with open_app() as (app, pilot, run):
        assert any(expected in str(note.message) for note in app._notifications)
        await pilot.press("C")
        assert [c.name for c in run.sent] == ["checkpoint"]


def test_the_key_table_has_no_two_keys_alike(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("")
    assert read_keymap(tmp_path / "keys.toml") == ({}, [])
    assert len({key.id for key in KEYS}) == len(KEYS)
    for key in KEYS:
        assert hasattr(ZerotopApp, f"action_{key.action.split('(')[0]}")


async def test_help_lists_every_key_and_closes(open_app: OpenApp) -> None:
    async with open_app(size=(200, 110)) as (app, pilot, _):
        await pilot.press("question_mark")
        await pilot.pause()
        assert isinstance(app.screen, HelpScreen)
        text = "\n".join(screen_text(app))
        for key in KEYS:
            assert key.help[:40] in text
        await pilot.press("escape")
        await pilot.pause()
        assert not isinstance(app.screen, HelpScreen)


async def test_one_style_for_keys_everywhere(open_app: OpenApp) -> None:
    async with open_app(size=(200, 60)) as (app, pilot, _):
        await pilot.press("question_mark")
        await pilot.pause()
        text = "\n".join(screen_text(app))
        assert "Ctrl+S" in text and "Ctrl+P" in text and "^" not in text


async def test_the_palette_has_every_keys_action(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        await pilot.press("ctrl+p")
        await pilot.pause()
        assert isinstance(app.screen, CommandPalette)
        main = app.screen_stack[0]
        names = [command.title for command in app.get_system_commands(main)]
        assert len(set(names)) == len(names)
        assert {key.palette_title for key in KEYS if key.group != "log"} <= set(names)
        assert {"Zoom", "Figure", "Filter", "Save screenshot", "Screen: Logs", "Open rank", "Theme: Light"} <= set(
            names
        )


@pytest.mark.parametrize(
    ("typed", "shows"),
    [
        ("figure", "5 gradient norm"),
        ("screen: logs", "log and events"),
        ("filter", "a phase, an alarm"),
        ("zoom", "ranks · memory"),
        ("open rank", "3 phases of the last steps"),
    ],
)
async def test_the_palette_does_what_it_offers(open_app: OpenApp, typed: str, shows: str) -> None:
    async with open_app() as (app, pilot, _):
        await pilot.press("ctrl+p", *typed)
        for _ in range(300):
            await pilot.pause(0.01)
            if len(app.screen.query_one(CommandList).options) and not app.screen.query_one(CommandList).disabled:
                break
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        for _ in range(300):
            await settle(app, pilot)
            if not isinstance(app.screen, CommandPalette):
                break
            await pilot.press("enter")
        text = "\n".join(screen_text(app))
        assert shows in text
        if typed == "zoom":
            assert app.screen.maximized is not None and app.screen.query_one("#ranks").region.height > 30


async def test_the_setting_dialog_is_whole_in_a_small_terminal(open_app: OpenApp) -> None:
    async with open_app(size=(60, 20)) as (app, pilot, _):
        await pilot.press("E")
        await settle(app, pilot)
        assert "Esc go back" in "\n".join(screen_text(app))
        await pilot.press("down", "enter", "0")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert (
            all(words in text for words in ("Enter type, then send   Esc go back", "✖ log_interval"))
            and "knob" not in text
        )
        dialog = app.screen.query_one(".dialog")
        assert dialog.region in app.screen.region and dialog.max_scroll_y == 0


def test_every_sign_on_the_screen_is_in_fonts_that_people_have() -> None:
    """Looked up in DejaVu Sans Mono, the usual one on Linux (fc-query --format='%{charset}' DejaVuSansMono.ttf)."""
    there = set("–“”…·×‖←↑→↓↵↻⏎≤─│├┤└═━╌░▌█▁▂▃▄▅▆▇▏▎▍▌▋▊▉╸■□▲▶▼▾◇⊘┃╱◆●○◌◐◧✔✖❄°µé┬▒▓")
    used = {
        character
        for path in (*Path(zerotop.tui.__file__).parent.rglob("*.py"), Path(material.__file__))
        if path.name != "ascii.py"  # the table of what is replaced
        for character in path.read_text()
        if not character.isascii()
    }
    assert used <= there
