"""Random keys and bursts of text on every kind of screen: nothing breaks, and nothing is sent that was not asked for.

    make monkey KEYS=100000                                  # python -m tests.tui.monkey 100000 --seed 0
    python -m tests.tui.monkey 2000 --seed 17                # one session again, from its seed

Each session opens the screen on a run of its own kind, at a size of its own, begins with a burst that once broke
something, and goes on at random; now and then the run takes a step and the terminal another size.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from textual import events
from textual.app import App
from textual.keys import _character_to_key

from tests.harness.longrun import two_minutes
from tests.tui.screen_reading import screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.source.replay import ReplaySource
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import KEYS
from zerotop.tui.replay import ReplayApp
from zerotop.tui.screens.confirm import ConfirmScreen

MARKUP = ("[/", "[a=b", "[@click=app.abort]r[/] \\[b] [[")
STEERING_TEXT = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202eevil\u200b\x00\ud800"
WORDS = (*MARKUP, "CUDA", "Any", "Stop", "Ey", "SyAy[/t2z", "rank 1", "漢字", "é")
ONCE_BROKE = (
    ("/", *"SyAy[/t2z"),  # keys of a filter were commands of the run
    ("/", "[", "/"),
    ("A", "y"),
    ("E", "down", "enter", "5", "enter", "C"),
    ("ctrl+p", "t", "pagedown"),  # the palette turned a page while it searched
    ("ctrl+p", *"nothing is called that", "escape"),
    ("z", "x", "g", "u", "h", "h", "h", "h", "u"),
    ("3", "+", "+", "left", "<", "0"),
    ("6", "/", *"step", "enter", "n", "p", "m", "v", "i", "escape"),
    ("enter", "]", "T", "escape", "escape"),
)
"""Bursts with which sessions begin."""
FIXED = ("escape", "tab", "shift+tab", "enter", "up", "down", "pageup", "pagedown", "home", "end", "backspace")
VIEW = [word for key in KEYS if not key.steers and key.id != "detach" for word in key.keys.split(",")]
STEER = [word for key in KEYS if key.steers for word in key.keys.split(",")]
SIZES = ((80, 24), (120, 38), (60, 16), (200, 50), (300, 80), (20, 6), (200, 24))
SESSION = 500
"""Keys of a session, about."""


def burst(app: App[Any], *keys: str) -> None:
    """All keys at once, as a terminal's one read brings them. A single character is typed as it is."""
    for key in keys:
        named = len(key) > 1
        app.post_message(events.Key(key if named else _character_to_key(key), None if named else key))


async def session(seed: int, presses: int, folder: Path) -> int:
    """One session of about so many keys; returns how many. Raises what breaks, AssertionError for what was sent."""
    chance = random.Random(seed)
    kind = ("view", "nodes", "steer", "read-only", "replay", "hostile")[seed % 6]
    run = ScriptedRun(
        ranks=40 if kind == "nodes" else 4,
        nodes=5 if kind == "nodes" else 1,
        gpu=True,
        finetune=kind != "nodes",
        seed=seed,
        name=chance.choice([*MARKUP, STEERING_TEXT]) if kind == "hostile" else "q1",
    )
    run.steps(30)
    source: ReplaySource | None = None
    if kind == "replay":
        source = ReplaySource(two_minutes(folder / str(seed)), "q1")
        source.start()
    app = ReplayApp(source) if source is not None else ZerotopApp(run, read_only=kind == "read-only")
    app.action_detach = lambda: None  # type: ignore[method-assign]  # the palette may be made to choose it
    keys = [*VIEW, *FIXED, *(STEER if kind in ("steer", "read-only", "hostile") else ())]
    pressed: list[str] = []
    async with app.run_test(size=chance.choice(SIZES)) as pilot:
        await settle(app, pilot)
        typed = list(chance.choice(ONCE_BROKE)) if kind in ("steer", "read-only", "hostile", "replay") else []
        while len(pressed) < presses:
            for _ in range(chance.randint(1, 16)):
                text = kind not in ("view", "nodes") and chance.random() < 0.1  # letters may be commands
                typed += ["slash", *chance.choice(WORDS)] if text else [chance.choice(keys)]
            if isinstance(app.screen, ConfirmScreen):
                typed = ["n"]  # a question is never answered with yes
            pressed += typed
            burst(app, *typed)
            typed = []
            if chance.random() < 0.3:
                run.steps(1)
            if chance.random() < 0.03:
                await pilot.resize_terminal(*chance.choice(SIZES))
            await settle(app, pilot)
            assert app.is_running, told(seed, pressed)
        for _ in range(8):
            await pilot.press("escape")
        await pilot.resize_terminal(120, 38)
        await settle(app, pilot)
        assert "".join(screen_text(app)).strip(), told(seed, pressed)
    if source is not None:
        source.close()
    sent = {command.name for command in run.sent}
    assert not sent & ({"stop", "abort"} if kind in ("steer", "hostile") else sent), (sent, told(seed, pressed))
    return len(pressed)


def told(seed: int, pressed: list[str]) -> str:
    """Which session it was, and its last keys."""
    return f"seed {seed}, after {len(pressed)} keys: {pressed[-40:]}"


def main() -> int:
    """Sessions until so many keys were pressed."""
    parser = argparse.ArgumentParser(prog="python -m tests.tui.monkey", description=__doc__.splitlines()[0])
    parser.add_argument("keys", type=int, nargs="?", default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first session; the next ones count up")
    options = parser.parse_args()
    began, seed, pressed = time.monotonic(), options.seed, 0
    with tempfile.TemporaryDirectory(prefix="zerotop-monkey-") as folder:
        os.environ |= dict.fromkeys(("XDG_CONFIG_HOME", "XDG_PICTURES_DIR", "XDG_STATE_HOME"), folder)
        while pressed < options.keys:
            try:
                pressed += asyncio.run(session(seed, min(SESSION, options.keys - pressed), Path(folder)))
            except BaseException:
                print(f"python -m tests.tui.monkey {SESSION} --seed {seed} does it again", file=sys.stderr)
                raise
            seed += 1
            if (seed - options.seed) % 5 == 0:
                print(f"{pressed:,} keys in {seed - options.seed} sessions", flush=True)
    seconds = time.monotonic() - began
    print(f"{pressed:,} keys in {seed - options.seed} sessions, {seconds:.0f} s: nothing broke, nothing was sent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
