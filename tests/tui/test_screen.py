"""What the screen shows."""

from __future__ import annotations

import errno
import math
import re
from pathlib import Path

import pytest

from runtime.wire.judgement import Alert
from runtime.wire.messages import Collectives, PlannedMemory
from tests.tui.screen_reading import OpenApp, head_text, screen_text, settle
from tests.tui.scripted_run import GIB, MIB, ScriptedRun
from zerotop.tui.panels.events import EventPanel
from zerotop.tui.panels.memory import MemoryPanel
from zerotop.tui.panels.ranks import RankTable
from zerotop.tui.screens.rank import RankScreen


async def test_a_rank_shows_its_micro_step_as_dots_and_words(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.beat(1, "backward", 3)
        run.beat(0, "reduce", 0)
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "●●◐○ 3/4 backward" in text
        assert "●●●● reduce" in text


async def test_selection_scrolls_through_many_ranks_and_moves_the_memory_panel(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=256, gpu=True)
    run.slow_rank = -1  # one that the verdict blames would stand first
    run.steps(4)
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        await pilot.press("x", "down", "down")  # the grid is what opens
        assert app.screen.query_one(RankTable).selected == 2
        await pilot.press("end")
        await pilot.pause()
        assert app.screen.query_one(RankTable).selected == 255
        assert app.screen.query_one(MemoryPanel).rank == 255
        assert any("255 cuda:255" in line for line in screen_text(app))
        await pilot.press("home")
        await pilot.pause()
        assert any("  0 cuda:0" in line for line in screen_text(app))


async def test_enter_opens_a_rank_and_escape_goes_back(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.log("only rank 1 says this", rank=1)
        run.log("only rank 0 says this", rank=0)
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, RankScreen) and app.screen.rank == 1
        text = "\n".join(screen_text(app))
        assert "pid 4001" in text and "backward" in text and "only rank 1 says this" in text
        assert "only rank 0 says this" not in text
        await pilot.press("right_square_bracket")
        await settle(app, pilot)
        assert "pid 4000" in "\n".join(screen_text(app))
        await pilot.press("escape")
        await settle(app, pilot)
        assert not isinstance(app.screen, RankScreen)


async def test_a_cpu_run_says_so_and_a_gpu_run_shows_the_probes_figures(open_app: OpenApp) -> None:
    async with open_app(size=(200, 50)) as (app, _, _):
        assert "no GPU: CPU run" in "\n".join(screen_text(app))
    run = ScriptedRun(ranks=2, gpu=True)
    run.steps(5)
    async with open_app(run, size=(200, 50)) as (app, _, _):
        text = "\n".join(screen_text(app))
        assert "640/700 W" in text and "61°C" in text and "1830 MHz" in text and "96%" in text


async def test_memory_is_split_into_counted_and_derived_categories(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2, gpu=True)
    run.steps(5)
    async with open_app(run, size=(200, 50)) as (app, _, _):
        text = "\n".join(screen_text(app))
        for word in ("parameters", "gradients", "optimizer", "masters", "communication", "activations ~", "cache ~"):
            assert word in text
        assert "13.0 GiB" in text


async def test_the_memory_panel_names_every_part_the_peak_and_the_next_one(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2)
    run.steps(3)
    plan = PlannedMemory(
        device_bytes={"parameters": 58 * MIB, "activations": 30 * MIB}, shape_known=True, saved_bytes=MIB,
        comparison="ZeRO saves 1.00 MiB per rank against data parallelism here", checkpoint_bytes=8 * GIB,
        checkpoint_slots_bytes=64 * MIB,
    )  # fmt: skip
    for rank in (0, 1):
        hello, memory = run.state.ranks[rank].hello, run.state.ranks[rank].memory
        assert hello is not None and memory is not None
        parts = {"imports": 150 * MIB, "libraries": 90 * MIB, "activations": 20 * MIB, "rest": 2 * MIB}
        peaks = {"rss_parts": parts, "untouched_bytes": 9 * MIB, "peak_bytes": {"backward": 333 * MIB}}
        peaks |= {"logits_bytes": 5 * MIB}
        run.say(hello.model_copy(update={"planned": plan, "knobs": {"checkpoint_interval": 50}}))
        run.say(memory.model_copy(update=peaks))
    node = run.state.nodes["node-a"]
    run.say(node.model_copy(update={"ram_available_bytes": 5 * GIB, "memory_pressure_percent": 7.0}))
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        text = "\n".join(screen_text(app))
        assert "Python, data ~" in text and "libraries ~" in text and "not written yet" in text
        assert "activations ~    15.0 MiB" in text and "logits           5.00 MiB" in text
        assert "peak 333 MiB in backward, plan 328 MiB" in text and "waiting 7%" in text
        assert "next: the checkpoint at step 50:" in text and "16.0 GiB, 5.00 GiB free: through slots" in text
        await pilot.press("enter")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "peaks: backward 333 MiB" in text and "ZeRO saves 1.00 MiB per rank" in text
    async with open_app(run, size=(80, 24)) as (app, pilot, _):
        await pilot.press("2")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "peak 333 MiB in backward" in text and "next: the checkpoint at step 50" in text


async def test_collectives_say_their_group_where_there_are_several(open_app: OpenApp) -> None:
    run = ScriptedRun(ranks=2)
    run.steps(3)
    async with open_app(run, size=(200, 50)) as (app, pilot, _):
        await pilot.press("enter")
        await settle(app, pilot)
        assert "group" not in "\n".join(screen_text(app))
        for rank in (0, 1):
            records = [(1, "all_reduce", MIB, 0, 0, 900, 900)]
            run.say(Collectives(rank=rank, step=3, group="experts", records=records))
        await settle(app, pilot)
        lines = screen_text(app)
        assert any("number group" in line and "what" in line for line in lines)
        assert any("1 experts    all_reduce" in line for line in lines)
        assert any("world" in line and "reduce" in line for line in lines)


async def test_m_asks_for_a_memory_snapshot(open_app: OpenApp) -> None:
    async with open_app() as (_, pilot, run):
        await pilot.press("M")
        assert [(command.name, command.arguments) for command in run.sent] == [("memory-snapshot", {})]


async def test_old_data_is_called_old_and_loses_its_colour(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        assert "● live" in head_text(app)
        run.age = 7.0
        await settle(app, pilot)
        assert "no data for 7 s" in head_text(app)
        assert app.make_view().stale
        run.connection = "lost: ssh ended"
        await settle(app, pilot)
        assert "lost: ssh ended" in head_text(app)
        run.connection, run.age = "live", 0.1
        await settle(app, pilot)
        assert "● live" in head_text(app) and not app.make_view().stale


async def test_a_failed_run_shows_the_failing_ranks_error(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.fail(1, 'Traceback (most recent call last):\n  File "train.py", line 31\nRuntimeError: out of memory')
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "✖ failed" in text
        assert "rank 1: RuntimeError: out of memory" in text
        assert 'File "train.py", line 31' in text
        assert "✖ failed at 20" in text


async def test_events_follow_the_newest_unless_scrolled_up(open_app: OpenApp) -> None:
    async with open_app(size=(80, 24)) as (app, pilot, run):
        for number in range(40):
            run.log(f"line number {number}")
        await settle(app, pilot)
        assert "line number 39" in "\n".join(screen_text(app))
        app.screen.query_one(EventPanel).focus()
        await pilot.press("up", "up", "up")
        await settle(app, pilot)
        run.log("line number 40")
        await settle(app, pilot)
        assert "line number 40" not in "\n".join(screen_text(app))
        await pilot.press("end")
        await settle(app, pilot)
        run.log("line number 41")
        await settle(app, pilot)
        assert "line number 41" in "\n".join(screen_text(app))


async def test_the_filter_narrows_the_events_and_escape_clears_it(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.log("overflow, scale halved", "warning", 1)
        run.log("all is well")
        await settle(app, pilot)
        app.screen.query_one(EventPanel).focus()
        await pilot.press("slash", *"overfl")
        await settle(app, pilot)
        panel = app.screen.query_one(EventPanel)
        assert panel.filter == "overfl"
        text = "\n".join(screen_text(app))
        assert "overflow, scale halved" in text and "all is well" not in text
        await pilot.press("enter")
        assert panel.has_focus and panel.filter == "overfl"
        await pilot.press("escape")
        await settle(app, pilot)
        assert panel.filter == "" and "all is well" in "\n".join(screen_text(app))


async def test_a_frozen_view_stands_still_looks_frozen_and_still_shows_answers(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("f")
        run.steps(5)
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "VIEW FROZEN at step 20" in text and "step 20 of" in text and "paused" not in text
        assert app.screen.has_class("-frozen")
        await pilot.press("C")
        run.accept(run.sent[0])
        run.apply_command(run.sent[0])
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "checkpoint #1: applied at step 25" in text and "step 20 of" in text
        await pilot.press("f")
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "VIEW FROZEN at step 20" not in text and "step 25 of" in text


async def test_nothing_is_drawn_when_nothing_changed(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_app() as (app, pilot, run):
        drawn: list[object] = []
        monkeypatch.setattr(type(app.screen), "show_view", lambda self, view: drawn.append(view))
        for _ in range(3):
            await settle(app, pilot)
        assert drawn == []
        run.steps(1)
        await settle(app, pilot)
        assert len(drawn) == 1


async def test_g_shows_the_next_figure(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, _):
        assert "5 loss" in "\n".join(screen_text(app))
        await pilot.press("g")
        await settle(app, pilot)
        assert "5 gradient norm" in "\n".join(screen_text(app))
        app.screen.query_one("#speed").focus()
        await pilot.press("g")
        await settle(app, pilot)
        assert "5 step time" in "\n".join(screen_text(app))


async def test_a_loss_that_is_not_a_number_is_shown_as_such(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(5)
    last = run.state.ranks[0].step
    assert last is not None
    run.say(last.model_copy(update={"step": 6, "loss": math.nan}))
    async with open_app(run) as (app, _, _):
        assert "5 loss  NaN" in "\n".join(screen_text(app))


async def test_an_empty_run_draws_and_says_what_it_waits_for(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.state.__init__()  # type: ignore[misc]
    run.connection, run.age = "connecting", None
    async with open_app(run, size=(80, 24)) as (app, _, _):
        text = "\n".join(screen_text(app))
        assert "◌ connecting" in text and "waiting for ranks to connect" in text and "no data yet" in text


async def test_the_program_saves_its_own_picture(open_app: OpenApp, tmp_path: Path) -> None:
    async with open_app() as (app, _, _):
        path = app.save_svg(tmp_path / "screen.svg")
        assert path.read_text().lstrip().startswith("<svg") and "ZeRO-2" in path.read_text()


@pytest.mark.parametrize("folder", ["given", "Pictures", "Downloads", None])
async def test_a_screenshot_goes_where_pictures_go_and_says_where(
    open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    target = tmp_path / (folder or "here")
    target.mkdir()
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_PICTURES_DIR", str(tmp_path / "given"))
    monkeypatch.chdir(tmp_path / "here")
    async with open_app() as (app, pilot, _):
        await pilot.press("ctrl+s")
        await pilot.pause()
        (path,) = target.glob("zerotop-q1-20*.svg")
        assert path.read_text().lstrip().startswith("<svg") and "ZeRO-2" in path.read_text()
        assert str(path) == next(iter(app._notifications)).message


async def test_a_screenshot_that_cannot_be_written_says_the_path_and_why(
    open_app: OpenApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setenv("XDG_PICTURES_DIR", str(tmp_path))
    async with open_app() as (app, pilot, _):
        monkeypatch.setattr(Path, "write_text", full)
        await pilot.press("ctrl+s")
        await pilot.pause()
        note = next(iter(app._notifications))
        assert note.severity == "error" and f"{tmp_path}/zerotop-q1-" in note.message
        assert "No space left on device" in note.message


async def test_the_table_and_the_banner_tell_the_same_waiting(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(30)
    async with open_app(run) as (app, _, _):
        text = screen_text(app)
        told = re.search(r"the others wait for rank 1, ([\d.]+) ms a step \((\d+)%\)", text[0])
        rows = [line for line in text if "cpu" in line]
        assert told is not None
        shown = [re.search(r"([\d.]+) ms +(\d+)%", row) for row in rows]
        assert shown[0] is not None and shown[1] is not None
        assert shown[0][1] == told[1] and shown[0][2] == told[2]
        assert float(shown[1][1]) == 0.0
        assert any("waits: last 20 steps" in line for line in text)


async def test_a_rank_without_a_goodbye_has_ended_with_its_run(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.beat(1, "backward", 1)
        run.status("aborted", reason="asked for")
        await settle(app, pilot)
        rows = [line for line in screen_text(app) if "cpu" in line]
        assert all("– ended" in row and "backward" not in row for row in rows)
        await pilot.press("down", "enter")
        await settle(app, pilot)
        facts = app.screen.query_one("#facts").region
        assert "ended" in screen_text(app)[facts.y + 1] and "backward" not in screen_text(app)[facts.y + 1]


@pytest.mark.parametrize(
    ("reason", "code", "expected"),
    [
        ("rank 1 was killed by SIGKILL (out of memory?)", -9, "the run failed: rank 1 was killed by SIGKILL (out of"),
        ("RuntimeError: no", 1, "the run failed: rank 1: RuntimeError: no (exit 1)"),
        ("rank 1 exited with code 3", 3, "the run failed: rank 1 exited with code 3"),
        ("rank 10 lost its peer", 1, "the run failed: rank 1: rank 10 lost its peer (exit 1)"),
    ],
)
async def test_a_failure_says_everything_once(open_app: OpenApp, reason: str, code: int, expected: str) -> None:
    async with open_app() as (app, pilot, run):
        run.status("failed", reason=reason, failed_rank=1, exit_code=code)
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert expected in text and text.count("exit") == expected.count("exit")


async def test_log_lines_with_escapes_and_several_lines_are_shown_plain(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        run.log("\x1b[31mloud\x1b[0m first\nsecond\tline", "error", 1)
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "✖ error rank 1 loud first" in text and "second  line" in text and "\x1b" not in text


async def test_the_header_says_that_training_waits_for_a_checkpoint_and_how_old_the_newest_step_is(
    open_app: OpenApp,
) -> None:
    async with open_app() as (app, pilot, run):
        assert "▶ running" in head_text(app) and "last step" not in head_text(app)
        for seconds, shown in ((2.0, ""), (10.0, "last step 12 s ago")):
            run.now_ns += int(seconds * 1e9)
            for rank in range(2):
                run.beat(rank, "checkpoint", 0)
            await settle(app, pilot)
            assert "◧ saving" in head_text(app) and ("last step" in head_text(app)) == bool(shown)
            assert shown in head_text(app)
        run.steps(1)
        await settle(app, pilot)
        assert "▶ running" in head_text(app) and "last step" not in head_text(app)
        run.status("paused")
        run.now_ns += 60 * 10**9
        for rank in range(2):
            run.beat(rank, "paused", 0)
        await settle(app, pilot)
        assert "‖ paused" in head_text(app) and "last step" not in head_text(app)


async def test_the_header_says_what_is_true_now(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):

        async def top() -> str:
            await settle(app, pilot)
            return head_text(app)

        assert "▶ running" in await top() and "done " in await top()
        for rank in range(2):
            run.beat(rank, "backward", 2, idle_ms=111_000)
        text = await top()
        assert "▲ stalled" in text and "no progress for 1m 51s" in text
        assert "running" not in text and "done " not in text
        for rank in range(2):
            run.beat(rank, "backward", 3)
        assert "▶ running" in await top()
        run.status("stopping")
        text = await top()
        assert "◧ stopping" in text and "running" not in text and "done " not in text
        run.status("running")
        run.connection = "lost: nothing heard for 9 s"
        text = await top()
        assert "? unknown" in text and "▶" not in text and "done " not in text


async def test_a_frozen_view_says_how_the_run_is_now(open_app: OpenApp) -> None:
    async with open_app() as (app, pilot, run):
        await pilot.press("f")
        run.status("paused")
        await settle(app, pilot)
        top = head_text(app)
        assert "‖ paused" in top and "running" not in top and "VIEW FROZEN at step 20" in top
        assert "done " not in top


async def test_a_new_record_has_only_itself_wrapped(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_app() as (app, pilot, run):
        for number in range(600):
            run.log(f"{number} " + "word " * 3000)
        await settle(app, pilot)
        run.log("with the scroll bar there, lines are one cell shorter")
        await settle(app, pilot)
        wrapped: list[int] = []
        wrap = EventPanel._wrap_record
        monkeypatch.setattr(EventPanel, "_wrap_record", lambda *given: wrapped.append(1) or wrap(*given))
        run.log("the newest")
        await settle(app, pilot)
        assert len(wrapped) == 1 and "the newest" in "\n".join(screen_text(app))
        await pilot.press("up")
        await settle(app, pilot)
        assert "more characters: zerotop logs" in "\n".join(screen_text(app))


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_a_restart_is_followed_without_a_new_connection(open_app: OpenApp, size: tuple[int, int]) -> None:
    run = ScriptedRun()
    run.steps(20)
    hellos = [rank.hello for rank in run.state.ranks.values() if rank.hello]
    async with open_app(run, size=size) as (app, pilot, _):
        why = "restart 1 of 3: rank 1 was killed by SIGKILL (out of memory?)"
        more = {"attempt": 2, "restarts": 1, "restart_reason": "rank 1 was killed by SIGKILL"}
        run.status("restarting", reason=why, **more)
        await settle(app, pilot)
        top = head_text(app)
        assert "↻ restarting" in top and why in top
        for hello in hellos:
            run.say(hello.model_copy(update={"attempt": 2, "start_step": 15}))
        run.status("running", reason="", lost_steps=5)
        await settle(app, pilot)
        head = head_text(app)
        assert "running" in head and "step 15 of 200" in head
        if size[0] == 200:
            assert "restarts 1, 5 steps replayed" in head and "restarted: rank 1 was killed by SIGKILL" in head


async def test_firing_alerts_stand_beside_the_state_and_what_does_not_fit_is_shortened(open_app: OpenApp) -> None:
    run = ScriptedRun()
    run.steps(20)
    async with open_app(run, size=(160, 40)) as (app, pilot, _):
        assert "alert" not in head_text(app)
        firing = {"rule": "loss > 10", "state": "firing", "text": "loss 12"}
        run.say(Alert.model_validate({"name": "loss > 10", **firing}))
        await settle(app, pilot)
        assert "▲ alert: loss > 10: loss 12 " in head_text(app)
        run.say(Alert.model_validate({"name": "memory \x1b[31m", **firing, "severity": "error"}))
        await settle(app, pilot)
        assert "▲ alert: memory : loss 12 and 1 more" in head_text(app)
        await pilot.resize_terminal(60, 30)
        await settle(app, pilot)
        assert "▲ alert: memory" in head_text(app) or "▲ 2 alerts" in head_text(app)
        for name in ("loss > 10", "memory \x1b[31m"):
            run.say(Alert.model_validate({"name": name, **firing, "state": "resolved"}))
        await settle(app, pilot)
        assert "alert" not in head_text(app)
