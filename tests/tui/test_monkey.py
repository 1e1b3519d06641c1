"""Random keys: nothing breaks, and nothing is sent that was not asked for."""

from __future__ import annotations

import random

import pytest

from tests.tui.screen_reading import screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import KEYS

VIEW_KEYS = [
    word for key in KEYS if not key.steers and key.id not in {"detach", "screenshot"} for word in key.keys.split(",")
]
FIXED = ["escape", "tab", "shift+tab", "enter", "up", "down", "pageup", "pagedown", "home", "end", "j", "k"]
OTHERS = ["left_square_bracket", "right_square_bracket", "x", "y", "space", "ctrl+p", "question_mark"]
SIZES = [(80, 24), (120, 38), (60, 16), (200, 50), (300, 80), (20, 6)]


@pytest.mark.parametrize(
    ("seed", "nodes"), [(1, 1), (4, 5), *(pytest.param(seed, 1, marks=pytest.mark.slow) for seed in (2, 3))]
)
async def test_random_keys_break_nothing_and_send_nothing(
    seed: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`y` is among them: it would answer a question, but no question was asked for."""
    rng = random.Random(seed)
    run = ScriptedRun(ranks=4 if nodes == 1 else 8 * nodes, nodes=nodes, gpu=True, finetune=True, seed=seed)
    run.steps(30)
    app = ZerotopApp(run)
    async with app.run_test(size=(120, 38)) as pilot:
        await settle(app, pilot)
        pressed: list[str] = []
        for number in range(120):
            key = rng.choice(VIEW_KEYS + FIXED + OTHERS)
            pressed.append(key)
            await pilot.press(key)
            if number % 10 == 0:
                run.steps(1)
                await settle(app, pilot)
            if number % 30 == 29:
                await pilot.resize_terminal(*rng.choice(SIZES))
                await settle(app, pilot)
            assert app.is_running, pressed[-20:]
        for _ in range(8):
            await pilot.press("escape")
        await pilot.resize_terminal(120, 38)
        await settle(app, pilot)
        assert run.sent == [], pressed
        assert "of 200" in "\n".join(screen_text(app)), "it still shows the run"
