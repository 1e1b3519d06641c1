"""The screen in plain ASCII."""

from __future__ import annotations

import pytest

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.ascii import Plain, ascii_table, wants_ascii

TABLE = Plain(ascii_table())


async def test_every_screen_has_an_ascii_sign_for_each_of_its_signs(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=4, gpu=True, finetune=True)
    run.steps(60)
    run.state.events.clear()  # what ranks say may be in any script
    async with open_app(run) as (app, pilot, _):
        for key in "1234567":
            await pilot.press(key)
            await settle(app, pilot)
            for line in screen_text(app):
                shown = line.translate(TABLE)
                assert shown.isascii() and len(shown) == len(line)
                assert "?" not in shown.replace("? Help", ""), (key, line)


def test_a_plot_keeps_its_shape_in_ascii() -> None:
    assert "⠉".translate(TABLE) == "'" and "⣀".translate(TABLE) in "._" and "⣿".translate(TABLE) == "#"
    assert "漢".translate(TABLE) == "?" and "abc\x1b[0m".translate(TABLE) == "abc\x1b[0m"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LANG": "C"}, False),
        ({"LANG": "de_DE.ISO-8859-1"}, True),
        ({"LANG": "de_DE.utf8@euro"}, False),
        ({"LC_ALL": "de_DE.ISO-8859-15", "LANG": "de_DE.UTF-8"}, True),
        ({"TERM": "linux", "LANG": "C.UTF-8"}, True),
        ({"TERM": "linux", "ZEROTOP_ASCII": "0"}, False),
        ({"TERM": "xterm-256color", "ZEROTOP_ASCII": "1"}, True),
    ],
)
def test_ascii_is_used_where_it_must_be_and_where_it_is_asked_for(environment: dict[str, str], expected: bool) -> None:
    assert wants_ascii(environment) is expected
