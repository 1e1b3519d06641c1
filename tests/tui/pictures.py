"""The pictures in docs/: every screen, drawn from the recorded run and from a scripted one of eight GPUs.

python -m tests.tui.pictures
"""

from __future__ import annotations

import asyncio
import os
import time

from tests.harness import ROOT
from tests.harness.recorded_run import RecordedRun
from tests.tui.screen_reading import settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.source.base import Source
from zerotop.tui.app import ZerotopApp
from zerotop.tui.keys import PAGE_NAMES

FOLDER = ROOT / "docs" / "screens"
SIZE = (120, 38)


async def draw(run: Source, wall_s: float, names: dict[str, str]) -> None:
    """One picture for each key."""
    app = ZerotopApp(run)
    app.clock = lambda: wall_s
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        for keys, name in names.items():
            for key in keys.split():
                await pilot.press(key)
            await settle(app, pilot)
            app.save_svg(FOLDER / f"{name}.svg")


def main() -> None:
    os.environ |= {"TZ": "UTC", "XDG_CONFIG_HOME": "/nonexistent"}
    time.tzset()
    FOLDER.mkdir(exist_ok=True)
    recorded = {key: name.lower() for key, name in PAGE_NAMES.items() if name not in {"Overview", "Data"}}
    live, ended = RecordedRun("quickstart-2-ranks", 64), RecordedRun("quickstart-2-ranks")
    asyncio.run(draw(live, live.wall_s, recorded))
    asyncio.run(draw(ended, ended.wall_s, {"1": "summary"}))
    gpus = ScriptedRun(ranks=8, gpu=True, finetune=True, steps=400)
    gpus.steps(230)
    asyncio.run(draw(gpus, gpus.wall_s, {"1": "overview", "8": "data"}))
    many = ScriptedRun(ranks=64, gpu=True, finetune=True, steps=400, nodes=8)
    many.gpu_changes = {13: {"temperature_c": 84.0}, 42: {"temperature_c": 79.0, "utilization_percent": 61.0}}
    many.steps(230)
    many.node()
    asyncio.run(draw(many, many.wall_s, {"g g right right": "grid"}))


if __name__ == "__main__":
    main()
