"""The Data screen (d), the evaluation curve in the loss plot, and the Texts screen (w)."""

from __future__ import annotations

import itertools
import re

import pytest
from rich.cells import cell_len

from runtime.wire.messages import Hello, RunStatus
from tests.harness.fakehub import hello
from tests.harness.finetuning import data_report, evaluation
from tests.harness.waiting import until_async
from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.state.run import RunState
from zerotop.tui.app import ZerotopApp
from zerotop.tui.pages.data import DataPage
from zerotop.tui.pages.overview import OverviewPage
from zerotop.tui.panels.data import ExamplePanel, why_no_report
from zerotop.tui.panels.texts import why_no_texts
from zerotop.tui.screens.texts import TextScreen
from zerotop.tui.widgets.keybar import KeyBar
from zerotop.tui.widgets.lines import Panel, ScrollPanel
from zerotop.tui.widgets.plot import BEST_MARK, MARK

SIZES = [(80, 24), (200, 50)]


def finetuning(steps: int = 180) -> ScriptedRun:
    run = ScriptedRun(finetune=True)
    run.steps(steps)
    return run


def text_of(app: ZerotopApp) -> str:
    return "\n".join(screen_text(app))


# ---- the Data screen -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["d", "w"])
async def test_every_panel_lies_inside_the_terminal(open_app: OpenApp, key: str) -> None:
    async with open_app(finetuning(), size=(200, 50)) as (app, pilot, _):
        await pilot.press(key)
        for size in ((200, 50), (120, 36), (80, 24), (60, 16), (30, 8)):
            await pilot.resize_terminal(*size)
            await settle(app, pilot)
            await until_async(lambda size=size: len(screen_text(app)) == size[1])
            lines = screen_text(app)
            assert all(cell_len(line) == size[0] for line in lines)
            panels = [p for p in (*app.screen.query(Panel), *app.screen.query(ScrollPanel)) if p.region.area]
            for panel, other in itertools.combinations(panels, 2):
                assert panel.region in app.screen.region and not panel.region.overlaps(other.region), (panel, other)
            assert app.screen.max_scroll_y == 0 and lines[-1].strip().startswith("Esc Back")


@pytest.mark.parametrize("size", SIZES)
async def test_d_shows_what_is_trained(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(finetuning(), size=size) as (app, pilot, run):
        assert "8 Data" in text_of(app) or "1-8 Screens" in screen_text(app)[-1]
        await pilot.press("d")
        await settle(app, pilot)
        assert isinstance(app.page, DataPage) and run.sent == []
        text = text_of(app)
        for words in (
            "training data", "468K of 1.31M tokens", "7,105 of 7,168 rows", "chats/part-0.jsonl, rows 1 and 2",
            "lengths · cut at 2,048", "█", "≤ 2,048", "example 1 of 3 · 124 tokens, 33% trained",
            "Mount Everest", "<|im_end|>↵", "next document", "trained counted by the loss",
        ):  # fmt: skip
            assert words in text, words
        await pilot.press("escape")
        await settle(app, pilot)
        assert isinstance(app.page, OverviewPage)


async def test_examples_and_data_sets_are_switched(open_app: OpenApp) -> None:
    async with open_app(finetuning(), size=(120, 40)) as (app, pilot, _):
        await pilot.press("d", "right_square_bracket")
        await settle(app, pilot)
        assert "example 2 of 3" in text_of(app) and "… 17 tokens more" in text_of(app)
        await pilot.press("left_square_bracket", "left_square_bracket")
        await settle(app, pilot)
        assert "example 3 of 3" in text_of(app)
        assert "d: evaluation data" in text_of(app)
        await pilot.press("d")
        await settle(app, pilot)
        text = text_of(app)
        assert "evaluation data · d: training data" in text and "200 of 200 rows" in text and "example 1 of 2" in text
        assert "held-out.jsonl, row 0" in text
        await pilot.press("d")
        await settle(app, pilot)
        assert "training data" in text_of(app) and len(app.screen_stack) == 1


async def test_d_and_w_lead_from_one_to_the_other_and_back_to_the_run(open_app: OpenApp) -> None:
    async with open_app(finetuning()) as (app, pilot, _):
        await pilot.press("d", "w", "d", "w", "w")
        await settle(app, pilot)
        assert isinstance(app.screen, TextScreen) and len(app.screen_stack) == 2
        await pilot.press("question_mark", "d")
        await settle(app, pilot)
        assert not isinstance(app.page, DataPage)  # the help is on top
        await pilot.press("escape", "escape", "escape")
        await settle(app, pilot)
        assert isinstance(app.page, OverviewPage)


@pytest.mark.parametrize(("theme", "mono"), [("light", False), ("colour-blind", True)])
async def test_trained_tokens_are_underlined_in_every_theme_and_without_colour(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch, theme: str, mono: bool
) -> None:
    if mono:
        monkeypatch.setenv("NO_COLOR", "1")
    async with open_app(finetuning(), size=(120, 40)) as (app, pilot, _):
        app.theme = theme
        await pilot.press("d")
        await settle(app, pilot)
        panel = app.screen.query_one(ExamplePanel)
        segments = [segment for strip in panel.render_lines(panel.size.region) for segment in strip]
        underlined = {segment.text for segment in segments if segment.style and segment.style.underline}
        assert "Mount Everest, at 8,849 metres above sea level." in underlined and "<|im_end|>" in underlined
        plain = {segment.text.strip() for segment in segments if segment.style and not segment.style.underline}
        assert {"What is the tallest mountain?", "<|im_start|>", "<|im_end|>"} <= plain


async def test_a_report_that_comes_later_appears_and_the_place_in_an_example_stays(open_app: OpenApp) -> None:
    run = ScriptedRun()
    async with open_app(run, size=(80, 24)) as (app, pilot, _):
        await pilot.press("d")
        await settle(app, pilot)
        assert "no data report yet" in text_of(app)
        run.say(data_report())
        await settle(app, pilot)
        assert "training data" in text_of(app) and "d: evaluation data" not in text_of(app)
        panel = app.screen.query_one(ExamplePanel)
        await pilot.press("down", "down")
        run.steps(1)
        await settle(app, pilot)
        assert panel.scroll_offset.y == 2
        await pilot.resize_terminal(100, 24)
        await settle(app, pilot)
        assert panel.scroll_offset.y == 2
        await pilot.press("right_square_bracket")
        await settle(app, pilot)
        assert panel.scroll_offset.y == 0


async def test_nothing_in_the_data_steers_the_terminal_or_is_markup(open_app: OpenApp) -> None:
    sample = data_report().examples[0]
    runs = [run.model_copy(update={"text": "[red]x[/red]\x1b[2J\x1b]0;owned\x07[/bad"}) for run in sample.runs[:2]]
    hostile = data_report(
        files=["[@click=app.quit]x\x1b[31m"], notes=["[/bad\u202e"], examples=[sample.model_copy(update={"runs": runs})]
    )
    run = ScriptedRun()
    run.say(hostile)
    async with open_app(run) as (app, pilot, _):
        await pilot.press("d")
        await settle(app, pilot)
        text = text_of(app)
        assert "[red]x[/red][/bad" in text and "[@click=app.quit]x" in text
        assert "\x1b" not in text and "\u202e" not in text and "owned" not in text


def test_an_empty_state_says_why() -> None:
    state = RunState()
    assert "waiting for ranks to connect" in why_no_report(state)
    state.apply(RunStatus(name="q1", state="running", attempt=1))
    state.apply(hello())
    assert "before the first step" in why_no_report(state)
    state.apply(Hello.model_validate({**hello().model_dump(), "steps": None}))
    assert why_no_report(state) == "no data report: the run has a script of its own"
    assert "no evaluation yet" in why_no_texts(state)
    state.apply(evaluation(0, texts=False))
    assert "zerotop.evaluation.prompts" in why_no_texts(state)


# ---- evaluations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [*SIZES, (120, 36)])
async def test_the_loss_plot_has_the_evaluations(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(finetuning(), size=size) as (app, pilot, run):
        text = text_of(app)
        assert f"{MARK} eval" in text and "2.1903" in text and f"{BEST_MARK} " in text and "2.1753" in text
        if size[0] > 80:
            text = text.replace("ppl", "perplexity").replace("at step", "at")
            assert "2.1903, perplexity 8.938" in text and "2.1753, perplexity 8.804 at 150" in text
        run.say(evaluation(180, 1.5))
        await settle(app, pilot)
        assert f"{BEST_MARK} eval" in text_of(app) and "best" in text_of(app)
        await pilot.press("g")
        await settle(app, pilot)
        assert "gradient norm" in text_of(app) and f"{BEST_MARK} eval" not in text_of(app)


@pytest.mark.parametrize("size", SIZES)
async def test_w_shows_the_newest_texts_and_follows(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(finetuning(), size=size) as (app, pilot, run):
        await pilot.press("w")
        await settle(app, pilot)
        text = text_of(app)
        assert "texts 8 of 8 · step 175 · loss 2.1903, perplexity 8.938" in text
        assert "What is the capital of France?" in text and "The capital of France is Paris." in text
        assert "evaluations · 8" in text and "8.804  ◆ best" in text
        run.say(evaluation(200, 1.25))
        await settle(app, pilot)
        assert "texts 9 of 9 · step 200" in text_of(app) and "◆ best" in text_of(app).split("texts")[1]


async def test_earlier_texts_stay_while_new_ones_come(open_app: OpenApp) -> None:
    async with open_app(finetuning(), size=(120, 30)) as (app, pilot, run):
        await pilot.press("w", *["left_square_bracket"] * 20)
        await settle(app, pilot)
        assert "texts 1 of 8 · step 0" in text_of(app) and "The The the of of the" in text_of(app)
        run.say(evaluation(200))
        await settle(app, pilot)
        assert "texts 1 of 9 · step 0" in text_of(app)
        await pilot.press(*["right_square_bracket"] * 20)
        run.say(evaluation(225))
        await settle(app, pilot)
        assert "texts 10 of 10 · step 225" in text_of(app)


async def test_the_list_keeps_the_shown_evaluation_in_sight(open_app: OpenApp) -> None:
    run = ScriptedRun(finetune=True)
    for step in range(25, 750, 25):
        run.say(evaluation(step, 2.0))
    async with open_app(run, size=(80, 24)) as (app, pilot, _):
        await pilot.press("w", *["left_square_bracket"] * 15)
        await settle(app, pilot)
        assert any(line.startswith("▌") and " 350 " in line for line in screen_text(app))


async def test_the_summary_of_an_ended_run_names_the_best_evaluation(open_app: OpenApp) -> None:
    run = finetuning()
    run.status("finished", ended_wall_s=run.wall_s)
    async with open_app(run, size=(200, 50)) as (app, _, _):
        assert "evaluation 2.1903, best 2.1753 (perplexity 8.804) at step 150" in text_of(app)


async def test_the_summary_names_the_checkpoint_nearest_the_best_evaluation(open_app: OpenApp) -> None:
    run = finetuning()  # evaluations every 25 steps, the best at step 150; checkpoints every 50
    run.steps(200 - run.step)
    run.say(evaluation(125, 1.5))
    run.status("finished", ended_wall_s=run.wall_s)
    async with open_app(run, size=(120, 38)) as (app, pilot, _):
        assert "step 200, nearest the best evaluation: step 150" in text_of(app)
        assert "zerotop export q1/step-150 out/" in text_of(app)
        hello = run.state.hello
        assert hello is not None
        run.say(hello.model_copy(update={"knobs": {"checkpoints_kept": 1}}))
        await settle(app, pilot)
        assert "step 200, nearest the best evaluation" in text_of(app) and ": step 150" not in text_of(app)


async def test_the_summary_of_a_run_without_evaluations_and_of_an_unknown_length_of_sequences(
    open_app: OpenApp,
) -> None:
    run = ScriptedRun(ranks=2)
    for rank in run.state.ranks.values():
        assert rank.hello is not None
        run.say(rank.hello.model_copy(update={"seq_len": 0}))
    run.steps(55, step_ms=500.0)
    newest = run.state.series.newest
    assert newest is not None
    run.say(newest.model_copy(update={"step": 56, "loss": 1.0}))
    run.status("stopped", ended_wall_s=run.wall_s)
    async with open_app(run, size=(120, 38)) as (app, _, _):
        told = re.search(r"55 of 200 steps, about (\d+)K tokens", text_of(app))
        assert told and 0.98 < int(told[1]) * 1000 / (56 * 16_384) < 1.02, "the steps differ in their times"
        assert "step 50, nearest the lowest loss" in text_of(app)


async def test_the_footer_names_data_and_texts_once_there_are_some(open_app: OpenApp) -> None:
    def footer() -> str:
        return app.screen.query_one(KeyBar).render_line(0).text

    run = ScriptedRun()
    async with open_app(run, size=(80, 24)) as (app, pilot, _):
        await settle(app, pilot)
        assert "A Abort" in footer() and "w Texts" not in footer()
        run.say(data_report(), evaluation(0))
        await settle(app, pilot)
        shown = footer()
        assert "w Texts" in shown and "S Stop" in shown and "A Abort" not in shown
        await pilot.resize_terminal(100, 24)
        await settle(app, pilot)
        assert "A Abort" in footer() and footer().index("A Abort") < footer().index("w Texts")
