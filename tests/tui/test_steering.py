"""Keys that act on the run: what they send, what they ask first, what they say about the answer."""

from __future__ import annotations

import pytest
from textual.widgets import Input, Static

from runtime.wire.messages import Ack, Command, CommandRecord
from runtime.wire.watchlines import WATCH_LINE, WATCH_LINES
from tests.tui.screen_reading import OpenApp, head_text, screen_text, settle
from tests.tui.scripted_run import ScriptedRun
from zerotop.tui.panels.strip import CommandStrip
from zerotop.tui.screens.confirm import ConfirmScreen
from zerotop.tui.screens.knobs import KnobScreen
from zerotop.tui.screens.rank import RankScreen
from zerotop.tui.widgets.keybar import KeyBar


def footer(app) -> str:  # type: ignore[no-untyped-def]
    return app.screen.query_one(KeyBar).render_line(0).text


async def test_p_pauses_then_resumes(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("P")
        assert [(c.name, c.arguments) for c in run.sent] == [("pause", {})]
        assert run.sent[0].id and run.sent[0].who
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        assert "‖ paused" in screen_text(app)[0] and "P Resume" in footer(app)
        await pilot.press("P")
        assert [c.name for c in run.sent] == ["pause", "resume"]
        assert run.sent[0].id != run.sent[1].id


async def test_a_second_p_while_the_first_waits_is_not_turned_round(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("P", "P")
        run.accept(run.sent[0])
        await settle(app, pilot)
        await pilot.press("P")
        assert [c.name for c in run.sent] == ["pause"]
        assert any("is still waiting for a step boundary" in str(n.message) for n in app._notifications)


async def test_a_command_shows_its_life_from_key_to_step(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("C")
        await settle(app, pilot)
        assert "checkpoint: sent" in "\n".join(screen_text(app))
        run.accept(run.sent[0])
        await settle(app, pilot)
        assert "checkpoint #1: accepted … waiting for a step boundary" in "\n".join(screen_text(app))
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "✔ checkpoint #1: applied at step 20 (" in text and "checkpoints/step-20" in text


async def test_an_answer_fades_and_goes_and_an_open_command_stays(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("C")
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        strip = app.screen.query_one(CommandStrip)
        answered = strip.region
        assert "applied" in screen_text(app)[answered.y] and not strip.shown[0].fading
        run.silence(8)
        await settle(app, pilot)
        assert "applied" in screen_text(app)[answered.y] and strip.shown[0].fading
        run.silence(3)
        await settle(app, pilot)
        assert "checkpoint #1" not in screen_text(app)[answered.y] and strip.region == answered
        await pilot.press("C")
        run.accept(run.sent[1])
        run.silence(60)
        await settle(app, pilot)
        assert "checkpoint #2: accepted" in screen_text(app)[answered.y]


async def test_the_age_of_the_last_word_moves_the_hub_clock_on(open_app: OpenApp) -> None:
    """After the run's end nothing comes from the hub any more, and the answer to the stop must go all the same."""
    async with open_app() as (app, pilot, run):
        await pilot.press("S", "y")
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        assert "stop #1: applied" in "\n".join(screen_text(app))
        run.age = 11.0
        await settle(app, pilot)
        assert "stop #1: applied" not in "\n".join(screen_text(app))


async def test_an_answer_older_than_the_screen_is_not_shown(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(5)
    old = Command(id="old", name="checkpoint", number=1, who="b@laptop")
    run.state.apply(CommandRecord(command=old, ack=Ack(id="old", number=1, state="applied", step=3)))
    async with open_app(run) as (app, _, _):
        assert "checkpoint #1" not in "\n".join(screen_text(app))


async def test_a_rejection_says_why(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("C")
        run.accept(run.sent[0])
        run.reject(run.sent[0], "the disk is full")
        await settle(app, pilot)
        assert "✖ checkpoint #1: rejected: the disk is full" in "\n".join(screen_text(app))


@pytest.mark.parametrize(("key", "name"), [("S", "stop"), ("A", "abort")])
@pytest.mark.parametrize("answer", ["n", "escape", "enter", "space", "q"])
async def test_stop_and_abort_ask_first_and_only_y_does_it(open_app: OpenApp, key: str, name: str, answer: str) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press(key)
        assert isinstance(app.screen, ConfirmScreen) and run.sent == []
        await pilot.press(answer)
        await pilot.pause()
        assert run.sent == [] and app.is_running
        if isinstance(app.screen, ConfirmScreen):
            await pilot.press("y")
            await pilot.pause()
            assert [c.name for c in run.sent] == [name]


async def test_stop_says_where_it_stops_and_how_to_go_on(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("S")
        text = " ".join(str(static.content) for static in app.screen.query(Static))
        assert "at the next step boundary" in text and "zerotop launch --resume --name q1" in text
        assert "step 2" not in text  # the run goes on under the question: no number stays true
        await pilot.press("y")
        await pilot.pause()
        assert [c.name for c in run.sent] == ["stop"]


async def test_abort_says_what_is_lost(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(53)
    async with open_app(run) as (app, pilot, _):
        await pilot.press("A")
        text = " ".join(str(static.content) for static in app.screen.query(Static))
        assert "3 steps since the checkpoint at step 50" in text and "about 1 s of training" in text
    fresh = ScriptedRun()
    fresh.steps(20)
    async with open_app(fresh) as (app, pilot, _):
        await pilot.press("A")
        text = " ".join(str(static.content) for static in app.screen.query(Static))
        assert "There is no checkpoint yet (20 steps" in text


async def test_a_knob_is_checked_while_typed_and_sent_with_its_type(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("E")
        assert isinstance(app.screen, KnobScreen)
        assert "log_interval         10 steps" in "\n".join(screen_text(app))  # what the ranks started with
        await pilot.press("down", "enter", "0")
        await pilot.pause()
        verdict = app.screen.query_one("#verdict-value", Static)
        assert "a whole number from 1 to 1000000" in str(verdict.content) and verdict.has_class("bad")
        await pilot.press("enter")
        assert run.sent == [] and isinstance(app.screen, KnobScreen)
        app.screen.query_one(Input).value = ""
        await pilot.press("5")
        await pilot.pause()
        assert verdict.has_class("good")
        await pilot.press("enter")
        await pilot.pause()
        assert [(c.name, c.arguments) for c in run.sent] == [("set", {"log_interval": 5})]
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        assert "set log_interval=5 #1: applied at step 20" in "\n".join(screen_text(app))
        await pilot.press("colon")
        await pilot.pause()
        assert "log_interval" in "\n".join(screen_text(app)) and "5 steps" in "\n".join(screen_text(app))
        await pilot.press("escape")
        await pilot.pause()
        assert not isinstance(app.screen, KnobScreen)


@pytest.mark.parametrize("why", ["read-only", "ended", "recording"])
async def test_who_may_only_watch_gets_no_steering_keys(open_app: OpenApp, why: str) -> None:
    run = ScriptedRun()
    run.steps(20)
    if why == "ended":
        run.status("finished")
    run.can_control = why != "recording"
    async with open_app(run, size=(200, 50), read_only=why == "read-only") as (app, pilot, _):
        await pilot.press("P", "C", "S", "A", "E", "colon")
        await pilot.pause()
        assert run.sent == [] and not isinstance(app.screen, ConfirmScreen | KnobScreen)
        assert "Pause" not in footer(app) and "Abort" not in footer(app) and "Leave" in footer(app)
        names = {command.title for command in app.get_system_commands(app.screen)}
        assert "Abort" not in names and {"Freeze", "Theme: Light"} <= names


async def test_steering_keys_go_when_the_run_ends_under_the_screen(open_app: OpenApp) -> None:
    async with open_app(size=(200, 50)) as (app, pilot, run):
        assert "Pause" in footer(app)
        run.status("finished")
        await settle(app, pilot)
        assert "Pause" not in footer(app) and "✔ finished" in head_text(app)
        await pilot.press("P")
        assert run.sent == []


@pytest.mark.parametrize(("state", "outcome"), [("running", "detached"), ("paused", "detached"), ("finished", "ended")])
async def test_q_leaves_and_sends_nothing(open_app: OpenApp, state: str, outcome: str) -> None:
    async with open_app() as (app, pilot, run):
        run.status(state)
        await settle(app, pilot)
        await pilot.press("q")
        await pilot.pause()
        assert app.return_value == outcome and run.sent == [] and not run.closed


async def test_a_command_of_somebody_else_is_shown_too(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        other = app.desk.make("pause").model_copy(update={"id": "of another screen", "who": "b@laptop"})
        app.desk._sent.clear()
        run.accept(other)
        run.apply_command(other)
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "pause #1: applied at step 20" in text and "‖ paused" in text


async def test_a_tick_finds_a_screen_that_is_not_drawn_yet(open_app: OpenApp) -> None:
    async with open_app(size=(200, 50)) as (app, pilot, _):
        shown = app.push_screen(RankScreen(app.palette, 1))
        app.update_view()
        await shown
        await settle(app, pilot)
        assert "Next rank" in footer(app)


async def test_the_footers_keys_can_be_clicked(open_app: OpenApp) -> None:
    async with open_app(size=(200, 50)) as (app, pilot, run):
        at = footer(app).index("Checkpoint")
        assert await pilot.click(KeyBar, offset=(at + 2, 0))
        await pilot.pause()
        assert [c.name for c in run.sent] == ["checkpoint"]
        await pilot.press("1", "enter")
        await settle(app, pilot)
        await pilot.click(KeyBar, offset=(footer(app).index("Next rank"), 0))
        await pilot.pause()
        assert app.screen.rank == 1  # type: ignore[attr-defined]


async def test_r_profiles_all_ranks_and_on_a_rank_s_page_this_one(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("R")
        assert [(c.name, c.arguments) for c in run.sent] == [("profile", {"steps": 3})]
        await pilot.press("1", "down", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen)
        await pilot.press("R")
        assert run.sent[1].arguments == {"steps": 3, "ranks": [app.screen.rank]}


# ---- runs of other trainers ------------------------------------------------------------------------------------------
NO_SAVE = (
    "not possible with this trainer: give watch() a function that saves: watch(model, optimizer, save=lambda: ...)"
)
NO_LOOP = "not possible with this trainer: let the loop end when watcher.should_stop is true"


def wrapped_run(**impossible: str) -> ScriptedRun:
    """A run of `zerotop run` whose trainer can't obey these commands; without a rank's hello if `none` is given."""
    run = ScriptedRun()
    run.steps(20)
    if "none" in impossible:
        run.state.ranks.clear()
        run.state._lowest = None
    else:
        for rank in (0, 1):
            hello = run.state.ranks[rank].hello
            assert hello is not None
            run.say(hello.model_copy(update={"trainer": "torch 2.13 DDP", "impossible": impossible}))
    run.status("running", wrapped=True)
    return run


def question(app) -> str:  # type: ignore[no-untyped-def]
    return " ".join(str(static.content) for static in app.screen.query(Static))


@pytest.mark.parametrize(
    ("impossible", "says", "yes", "instead"),
    [
        ({}, "It writes a checkpoint", "checkpoint, then stop", "S stops the run after a checkpoint"),
        ({"checkpoint": NO_SAVE}, "zerotop can't make it save", "stop", "saves nothing either"),
        (
            {"checkpoint": NO_SAVE, "stop": NO_LOOP},
            "is sent SIGTERM now",
            "send SIGTERM",
            "the command SIGTERM instead",
        ),
        ({"none": ""}, "its script has not called watch()", "send SIGTERM", "the command SIGTERM instead"),
    ],
    ids=["saves", "stops", "signal", "no line"],
)
async def test_stop_and_abort_of_a_wrapped_run_say_what_will_happen(
    open_app: OpenApp, impossible: dict[str, str], says: str, yes: str, instead: str
) -> None:
    async with open_app(wrapped_run(**impossible)) as (app, pilot, run):
        await pilot.press("S")
        text = question(app)
        assert says in text and "--resume" not in text and f"y {yes} " in text
        assert ("Nothing is lost" in text) == (not impossible)
        await pilot.press("n", "A")
        text = question(app)
        assert instead in text and "what the command has not saved by itself" in text
        await pilot.press("n", "S", "y")
        await pilot.pause()
        assert [command.name for command in run.sent] == ["stop"]  # it is never impossible


@pytest.mark.parametrize("without_hello", [False, True])
async def test_keys_of_what_a_trainer_cannot_do_are_grey_and_say_why(open_app: OpenApp, without_hello: bool) -> None:
    run = wrapped_run(none="") if without_hello else wrapped_run(checkpoint=NO_SAVE, profile="not possible")
    why = "no rank of the command has reported" if without_hello else "give watch() a function that saves"
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        bar = app.screen.query_one(KeyBar)
        styles = {segment.text.split()[0]: segment.style for segment in bar.render_line(0) if segment.text.strip()}
        assert styles["Checkpoint"].color != styles["Leave"].color == styles["Abort"].color
        await pilot.press("C")
        assert run.sent == [] and any(why in str(note.message) for note in app._notifications)
        offered = {command.title: command.help for command in app.get_system_commands(app.screen)}
        assert why in offered["Checkpoint"] and "⊘" not in offered["Abort"] and "⊘" not in offered["Stop"]
        await pilot.press("question_mark")
        await pilot.pause()
        assert any("⊘" in line and why in line for line in screen_text(app))
        await pilot.press("escape")
        await pilot.press("P")
        assert [command.name for command in run.sent] == ([] if without_hello else ["pause"])


async def test_a_trainer_that_learns_to_save_gets_its_key_back(open_app: OpenApp) -> None:
    async with open_app(wrapped_run(checkpoint=NO_SAVE)) as (app, pilot, run):
        hello = run.state.ranks[0].hello
        assert hello is not None
        run.say(hello.model_copy(update={"impossible": {}}))
        await settle(app, pilot)
        await pilot.press("C")
        assert [command.name for command in run.sent] == ["checkpoint"]


async def test_the_end_of_a_wrapped_run_offers_neither_resume_nor_export(open_app: OpenApp) -> None:
    run = wrapped_run()
    run.status("failed", last_checkpoint_step=10, reason="a bad batch")
    async with open_app(run) as (app, _, _):
        text = "\n".join(screen_text(app))
        assert "zerotop status q1" in text
        assert "--resume" not in text and "zerotop export" not in text


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 50)], ids=str)
@pytest.mark.parametrize("of_trainer", [False, True])
async def test_a_run_whose_script_never_calls_watch_shows_the_line_itself(
    open_app: OpenApp, of_trainer: bool, size: tuple[int, int]
) -> None:
    """A user of the installed package has no docs folder."""
    run, line = wrapped_run(none=""), WATCH_LINE
    if of_trainer:
        run, line = ScriptedRun(ranks=1), WATCH_LINES["PyTorch Lightning"][0]
        run.steps(20)
        hello = run.state.ranks[0].hello
        assert hello is not None
        run.say(hello.model_copy(update={"counts_steps": False, "trainer": "torch.distributed", "watch_line": line}))
    async with open_app(run, size=size) as (app, _, _):
        text = " ".join(" ".join(screen_text(app)[:5]).split())
        assert "steps, phases and loss are not visible" in text and line in text and "docs/" not in text
