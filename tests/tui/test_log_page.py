"""The page of logs: what the scroll bar does to its lines."""

from __future__ import annotations

import pytest

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.panels.events import PREFIX
from zerotop.tui.panels.log import LogPanel


@pytest.mark.parametrize("size", [(80, 24), (120, 38)])
async def test_no_line_loses_its_end_when_the_scroll_bar_comes(open_app: OpenApp, size: tuple[int, int]) -> None:
    run = ScriptedRun()
    async with open_app(run, size=size) as (app, pilot, _):
        await pilot.press("6")
        await settle(app, pilot)
        log = app.screen.query_one(LogPanel)
        text = "".join(f"{number:03}" for number in range(99))  # folded at the last column, not at a blank
        for _ in range(size[1]):
            if log.show_vertical_scrollbar:
                break
            run.log(text, "warning")
            await settle(app, pilot)
            place = log.scrollable_content_region
            lines = [line[place.x : place.right] for line in screen_text(app)[place.y : place.bottom]]
            assert text in "".join(line[PREFIX:].rstrip() for line in lines)
        assert log.show_vertical_scrollbar
