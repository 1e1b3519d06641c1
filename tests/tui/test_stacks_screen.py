"""T asks for the stacks of all ranks and shows them, at every size."""

from __future__ import annotations

import pytest
from textual.containers import VerticalScroll

from runtime.wire.messages import Ack, CommandRecord
from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.screens.stacks import StacksScreen

REPORT = """q1, attempt 1, 2026-11-25 11:35:54 +0000
no progress for 61 s: rank 1 (stopped by a signal, pid 4001) has not entered all_reduce 812; rank 0 waits for it

rank 0: pid 4000, sleeping, step 21, backward, micro-step 3/4, last collective 812 (all_reduce), completed up to 811
rank 1: pid 4001, stopped by a signal, step 21, backward, micro-step 3/4, last collective 811 (all_reduce), completed

rank 0, training thread (innermost call first):
  File "/home/me/.venv/lib/python3.12/site-packages/runtime/comm/pending.py", line 116 in wait
  File "/home/me/\x1b[31mtrain.py", line 7 in <module>
"""
TAIL = "".join(f'  File "/usr/lib/python3.12/threading.py", line {line} in run\n' for line in range(100, 160))


def answer(run: ScriptedRun, state: str = "applied", reason: str = "", **result: str) -> None:
    command = run.sent[-1]
    run.accept(command)
    run.say(
        CommandRecord(command=command, ack=Ack(id=command.id, number=1, state=state, reason=reason, result=result))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_t_asks_and_shows_the_answer(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(size=size) as (app, pilot, run):
        await pilot.press("T")
        await settle(app, pilot)
        assert [c.name for c in run.sent] == ["stacks"] and isinstance(app.screen, StacksScreen)
        assert "waiting for the ranks" in "\n".join(screen_text(app))
        answer(run, path="logs/1/stacks-1.txt", text=REPORT + TAIL)
        app.screen.look()
        await settle(app, pilot)
        lines = screen_text(app)
        text = "\n".join(lines)
        assert "stacks of q1" in text and "logs/1/stacks-1.txt · Esc goes back" in text
        assert "  wait  runtime/comm/pending.py:116" in text and "  <module>  /home/me/train.py:7" in text
        assert "(stopped by a signal, pid 4001)" in text.replace("\n", " ")
        box = app.screen.query_one(VerticalScroll).region
        assert box.width <= size[0] and box.height <= size[1] and box.x >= 1 and box.y >= 1
        assert all(lines[y][box.right - 1] in "│╮╯" for y in range(box.y, box.bottom))
        assert "threading.py:159" not in text
        await pilot.press("end")
        await settle(app, pilot)
        assert "  run  threading.py:159" in "\n".join(screen_text(app))
        await pilot.press("home", "down")
        await settle(app, pilot)
        assert app.screen.query_one(VerticalScroll).scroll_offset.y == 1
        await pilot.press("escape")
        await settle(app, pilot)
        assert not isinstance(app.screen, StacksScreen)
        assert "✔ stacks #1: applied" in "\n".join(screen_text(app)) and len(run.sent) == 1


async def test_a_refusal_says_why(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("T")
        answer(run, "rejected", "the run ended before it could be applied")
        app.screen.look()  # type: ignore[attr-defined]
        await settle(app, pilot)
        assert "the run ended before it could be applied" in "\n".join(screen_text(app))


async def test_who_may_only_watch_asks_for_nothing(open_app: OpenApp) -> None:
    async with open_app(read_only=True) as (app, pilot, run):
        await pilot.press("T")
        await settle(app, pilot)
        assert run.sent == [] and not isinstance(app.screen, StacksScreen)


async def test_only_the_newest_stacks_are_kept_for_late_screens(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        for number in (1, 2):
            await pilot.press("T")
            answer(run, path=f"logs/1/stacks-{number}.txt", text=REPORT)
            await pilot.press("escape")
        results = [record.ack.result for record in run.state.commands.values()]
        assert [sorted(result) for result in results] == [["path"], ["path", "text"]]
        await settle(app, pilot)
