"""Helpers of the screen's tests: let the screen settle, read what stands on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from textual.pilot import Pilot

from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import Outcome, ZerotopApp

OpenApp = Callable[..., AbstractAsyncContextManager[tuple[ZerotopApp, Pilot[Outcome], ScriptedRun]]]


async def settle(app: ZerotopApp, pilot: Pilot[Outcome]) -> None:
    """One tick, and everything that it sets in motion (a panel that grows makes another one shrink)."""
    await pilot.pause()
    app.tick()
    await pilot.pause()
    await pilot.pause()


def screen_text(app: ZerotopApp) -> list[str]:
    """What stands on the terminal, line by line."""
    return ["".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()]


def head_text(app: ZerotopApp) -> str:
    """The verdict and the header, as one text."""
    return "\n".join(screen_text(app)[: app.screen.query_one("#header").region.bottom])
