"""Pictures and casts of a replay, drawn without a terminal."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from textual.pilot import Pilot
from textual.strip import Strip

from zerotop.output import CommandError
from zerotop.source.replay import ReplaySource
from zerotop.tui.app import Outcome
from zerotop.tui.replay import ReplayApp

Size = tuple[int, int]
"""Columns and lines."""
PICTURES_PER_S = 4
"""Pictures of a cast in a second of its time."""
PNG_TOOLS = (("rsvg-convert", "-o", "{out}", "{svg}"), ("inkscape", "--export-filename={out}", "{svg}"))
"""Programs that turn an SVG picture into a PNG picture."""


def save_picture(source: ReplaySource, wall_s: float, target: Path, size: Size) -> None:
    """Write the screen at a moment as an SVG or a PNG picture, by the suffix of `target`. Raises CommandError or
    OSError."""
    tool = _png_tool() if target.suffix.lower() == ".png" else None

    async def shoot(pilot: Pilot[Outcome]) -> None:
        await _show(app, pilot, wall_s)
        app.save_svg(svg)
        app.exit("ended")

    app = ReplayApp(source)
    with tempfile.TemporaryDirectory(prefix="zerotop-") as folder:
        svg = Path(folder) / "screen.svg" if tool is not None else target
        _run(app, size, shoot)
        if tool is not None:
            command = [word.format(out=target, svg=svg) for word in tool]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise CommandError(f"{tool[0]} could not write {target}: {last}", exit_code=1)


def _png_tool() -> tuple[str, ...]:
    for tool in PNG_TOOLS:
        if shutil.which(tool[0]):
            return tool
    raise CommandError(
        "PNG pictures need rsvg-convert or inkscape, and neither is installed: apt install librsvg2-bin, or use --svg"
    )


def save_cast(
    source: ReplaySource,
    span: tuple[float, float],
    target: Path,
    size: Size,
    speed: float,
    tell: Callable[[float], None] = lambda share: None,
) -> int:
    """Write the screen from span[0] to span[1] as an asciinema cast (asciicast v2), `speed` recorded seconds a second;
    returns the number of pictures. `tell` gets the share that is done. Raises OSError."""
    count = 0

    async def film(pilot: Pilot[Outcome]) -> None:
        nonlocal count
        before: list[str] = []
        with target.open("w", encoding="utf-8") as out:
            header = {"version": 2, "width": size[0], "height": size[1], "timestamp": int(span[0])}
            out.write(json.dumps(header | {"title": f"zerotop replay {source.name}"}) + "\n")
            for wall_s in _moments(source, span, speed):
                await _show(app, pilot, wall_s)
                lines = _lines(app, size)
                if changed := _changes(before, lines):
                    at_s = round((wall_s - span[0]) / speed, 3)
                    out.write(json.dumps([at_s, "o", changed], ensure_ascii=False) + "\n")
                    count += 1
                before = lines
                tell(min(1.0, (wall_s - span[0]) / max(1e-9, span[1] - span[0])))
        app.exit("ended")

    app = ReplayApp(source)
    _run(app, size, film)
    return count


def _moments(source: ReplaySource, span: tuple[float, float], speed: float) -> Iterator[float]:
    """The moments of which a cast has a picture: at most PICTURES_PER_S in a second of it."""
    frames = source.playback.frames
    shown_s = float("-inf")
    for number in range(frames.at(span[0]), frames.at(span[1]) + 1):
        begin_s, _ = frames.span(number)
        if begin_s - shown_s >= speed / PICTURES_PER_S:
            shown_s = begin_s
            yield max(begin_s, span[0])


def _run(app: ReplayApp, size: Size, work: Callable[[Pilot[Outcome]], object]) -> None:
    problem: list[Exception] = []

    async def guarded(pilot: Pilot[Outcome]) -> None:
        try:
            await work(pilot)  # type: ignore[misc]
        except Exception as error:  # Textual would print its own traceback
            problem.append(error)
            app.exit("ended")

    app.run(headless=True, size=size, auto_pilot=guarded)  # type: ignore[arg-type]
    if problem:
        raise problem[0]


async def _show(app: ReplayApp, pilot: Pilot[Outcome], wall_s: float) -> None:
    """Go to a moment, and wait until panels that grow or shrink by it have found their places."""
    app.replay.go_to(wall_s)
    app.tick()
    await pilot.pause()
    app.update_view()
    await pilot.pause()


def _lines(app: ReplayApp, size: Size) -> list[str]:
    """The screen's lines with their colours as a terminal takes them."""
    console = Console(
        width=size[0], file=io.StringIO(), force_terminal=True, color_system="truecolor", legacy_windows=False
    )
    # Textual has no public way to the lines of a screen; its own screenshots are made of the same strips.
    strips: list[Strip] = app.screen._compositor.render_strips()
    return [strip.render(console) for strip in strips]


def _changes(before: list[str], after: list[str]) -> str:
    """What a terminal that shows `before` needs to show `after`."""
    clear = "\x1b[2J\x1b[?25l" if len(before) != len(after) else ""
    old = before if not clear else [""] * len(after)
    rows = [f"\x1b[{y + 1};1H{new}" for y, (line, new) in enumerate(zip(old, after, strict=True)) if line != new]
    return clear + "".join(rows) if rows else ""
