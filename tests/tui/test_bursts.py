"""Keys that arrive all at once (a paste, a slow line) and text that pretends to be markup or an escape sequence."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from textual import events

from runtime.wire.messages import Ack, CommandRecord
from tests.harness import ROOT
from tests.tui.monkey import MARKUP, STEERING_TEXT, burst
from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.screens.confirm import ConfirmScreen
from zerotop.tui.screens.knobs import KnobScreen
from zerotop.tui.screens.page import FilterField, PageScreen
from zerotop.tui.screens.palette import ActionPalette
from zerotop.tui.screens.rank import RankScreen

TUI = ROOT / "zerotop" / "tui"


@pytest.mark.parametrize("text", ["CUDA", "Paused q", "SyAy[/t2z"])
async def test_a_filter_typed_in_one_burst_acts_on_nothing(open_app: OpenApp, text: str) -> None:
    async with open_app() as (app, pilot, run):
        burst(app, "/", *text)
        await settle(app, pilot)
        assert app.screen.query_one(FilterField).value == text == app.screen.query_one(RankTable).filter
        assert run.sent == [] and isinstance(app.screen, PageScreen) and app.theme == "dark"
        burst(app, "enter", "C", "/", *"P", "escape", "C")
        await settle(app, pilot)
        assert [command.name for command in run.sent] == ["checkpoint", "checkpoint"]
        assert app.screen.query_one(RankTable).filter == ""


async def test_a_burst_means_what_slow_typing_means(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        burst(app, "E", "down", "enter", "5", "enter", "C")
        await settle(app, pilot)
        assert [(c.name, c.arguments) for c in run.sent] == [("set", {"log_interval": 5}), ("checkpoint", {})]
        burst(app, "1", "down", "enter", "]", "escape", "5", "z")
        await settle(app, pilot)
        assert app.screen.maximized is app.screen.query_one("#plot-loss")


async def test_an_answer_typed_before_the_question_is_none(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        burst(app, "A", "y")
        await settle(app, pilot)
        assert isinstance(app.screen, ConfirmScreen) and run.sent == []
        await pilot.press("y")
        await settle(app, pilot)
        assert [command.name for command in run.sent] == ["abort"]


async def test_pasted_text_goes_into_a_field_or_nowhere(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        app.post_message(events.Paste("PCSAqy\nz"))
        burst(app, "/")
        app.post_message(events.Paste("CUDA\x1b[31m \u202eerror"))
        await settle(app, pilot)
        assert run.sent == [] and isinstance(app.screen, PageScreen)
        assert app.screen.query_one(RankTable).filter == "CUDA error"


@pytest.mark.parametrize("keys", [("ctrl+p", "t", "pagedown"), ("ctrl+p", *"theme", "pageup", "pagedown", "down")])
async def test_the_palette_turns_pages_while_it_searches(open_app: OpenApp, keys: tuple[str, ...]) -> None:
    async with open_app() as (app, pilot, run):
        burst(app, *keys)
        await settle(app, pilot)
        assert isinstance(app.screen, ActionPalette) and run.sent == []
        burst(app, "escape", "E", "pagedown", "pageup")
        await settle(app, pilot)
        assert isinstance(app.screen, KnobScreen)


async def test_a_palette_that_closes_looks_for_nothing_any_more(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        burst(app, "ctrl+p", *"nothing is called that")
        await settle(app, pilot)
        palette = app.screen
        assert isinstance(palette, ActionPalette)
        for _ in range(500):
            if palette._no_matches_timer is not None:
                break
            await pilot.pause(0.01)
        await pilot.press("escape")
        assert app.screen is not palette and palette._no_matches_timer is None and palette._busy_timer is None


def hostile(text: str) -> ScriptedRun:
    """A run in which everything that is text says `text`."""
    run = ScriptedRun(name=text)
    run.steps(20)
    for rank in run.state.ranks.values():
        assert rank.hello is not None
        run.say(rank.hello.model_copy(update={"host": text, "device": text, "device_name": text, "model_name": text}))
    for rank in range(2):
        run.beat(rank, "backward", 3, op=text)
    node = next(iter(run.state.nodes.values()))
    run.say(node.model_copy(update={"host": text, "gpu_note": text}))
    run.event(text, text, "warning", rank=1)
    run.log(text, "error", 0)
    return run


@pytest.mark.parametrize("text", [*MARKUP, STEERING_TEXT])
async def test_text_is_shown_as_it_is_wherever_it_comes_from(open_app: OpenApp, text: str) -> None:
    run = hostile(text)
    async with open_app(run, size=(160, 50)) as (app, pilot, _):

        async def check(*keys: str) -> None:
            burst(app, *keys)
            await settle(app, pilot)
            shown = "\n".join(screen_text(app))
            assert all(line.isprintable() for line in screen_text(app)) and "\u202e" not in shown
            if text in MARKUP:
                assert text in shown, keys
            else:
                assert "evil" in shown and "owned" not in shown

        await check()
        if text in MARKUP:
            await check("/", *text)
            await check("escape")
        for keys in (("S",), ("A",), ("T",)):
            await check(*keys)
            if keys == ("T",):
                answer = Ack(id=run.sent[-1].id, number=1, state="applied", result={"path": text, "text": text})
                run.say(CommandRecord(command=run.sent[-1], ack=answer))
                app.screen.look()  # type: ignore[attr-defined]
                await check()
            await pilot.press("escape")
        await check("1", "enter")
        assert isinstance(app.screen, RankScreen)
        app.notify(text, title=text)
        await check("escape")
        run.reject(app.desk.make("set", {"log_interval": text}), text)
        run.fail(1, f"{text}\nValueError: {text}")
        await check()


async def test_a_theme_may_be_called_anything(open_app: OpenApp, no_user_files: Path) -> None:
    (no_user_files / "themes" / "x.toml").write_text('label = "[/x] [a=b"\n')
    async with open_app() as (app, pilot, _):
        burst(app, "ctrl+p", *"Theme: [/")
        for _ in range(200):
            await settle(app, pilot)
            if "Theme: [/x] [a=b" in "\n".join(screen_text(app)):
                break
        else:
            raise AssertionError("\n".join(screen_text(app)))


def test_no_string_becomes_a_title_or_a_label_without_passing_through_plain() -> None:
    """Textual reads a plain string as markup in all of these."""
    named = {"border_title", "border_subtitle", "tooltip"}
    offences = []
    for path in TUI.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assign):
                targets = [t.attr for t in node.targets if isinstance(t, ast.Attribute)]
                if named & set(targets) and not _plain(node.value):
                    offences.append(where)
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                text = node.args[0] if node.args else None
                if name in {"Static", "Label", "Option"} and isinstance(text, ast.Constant | ast.JoinedStr | ast.BinOp):
                    offences.append(where)
                offences += [where for keyword in node.keywords if keyword.arg == "markup" and path.name != "app.py"]
    assert offences == []


def _plain(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "plain"
