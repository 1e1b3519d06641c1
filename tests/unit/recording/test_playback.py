"""The state at a moment of a recording is the one that a live screen had then."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from runtime.wire.messages import Collectives, Command, Phases, RunStatus
from tests.harness.longrun import BEGIN_S, SpokenRun, create, insert, pack, write
from zerotop.hub import blocks, timeline
from zerotop.recording.playback import Playback
from zerotop.state.condition import condition_of
from zerotop.state.run import RunState


def shown(state: RunState) -> dict[str, object]:
    """What a screen shows of a state."""
    return {
        "status": state.status,
        "steps": {number: rank.step for number, rank in state.ranks.items()},
        "memory": {number: rank.memory for number, rank in state.ranks.items()},
        "beats": {number: rank.heartbeat for number, rank in state.ranks.items()},
        "hellos": {number: rank.hello for number, rank in state.ranks.items()},
        "goodbyes": {number: rank.goodbye for number, rank in state.ranks.items()},
        "events": list(state.events),
        "commands": state.commands,
        "nodes": state.nodes,
        "verdict": state.verdict,
        "newest": list(state.series)[-20:],
        "evaluations": list(state.evaluations)[-1:],
        "waits": state.waits.window(),
    }


def recorded(folder: Path, run: SpokenRun, packed: bool) -> Path:
    walls = run.wall_s
    write(folder, run)
    if packed:
        with closing(create(folder / "recording.sqlite")) as database:
            pack(database, walls + blocks.PACK_AFTER_S)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_jump_gives_the_state_of_playing_from_the_beginning(tmp_path: Path, packed: bool) -> None:
    run = SpokenRun(ranks=3, finetune=True)
    for number in range(90):
        run.second()
        if number == 40:
            command = Command(id="c1", name="checkpoint")
            run.accept(command)
            run.apply_command(command)
    with Playback(recorded(tmp_path, run, packed)) as playback:
        state, before_s = RunState(), 0.0
        for frame in range(playback.frames.count):
            _, end_s = playback.frames.span(frame)
            playback.advance(state, before_s, end_s)
            before_s = end_s
            if frame in (0, 1, 30, 41, 60, playback.frames.count - 1):
                jumped = playback.state_at(frame)
                assert shown(jumped) == shown(state), frame
                assert jumped.hub_now_ns == state.hub_now_ns
        assert state.step == 90 and state.loss == run.state.loss
        assert list(state.series) == list(run.state.series)


def test_a_jump_after_a_restart_shows_the_new_attempt_alone(tmp_path: Path) -> None:
    run = SpokenRun(ranks=2)
    for _ in range(30):
        run.second()
    folder = write(tmp_path, run)
    with closing(create(folder / "recording.sqlite")) as database:
        hellos = [rank.hello for rank in run.state.ranks.values() if rank.hello]
        run.jump(5)
        run.say(RunStatus(name="q1", state="starting", attempt=2))
        run.say(hellos[0].model_copy(update={"attempt": 2, "start_step": 20, "pid": 9}))
        run.jump(5)
        insert(database, run.take(), attempt=2)
    with Playback(folder) as playback:
        state = playback.state_at(playback.frames.count - 1)
    assert set(state.ranks) == {0} and state.ranks[0].hello is not None and state.ranks[0].hello.pid == 9
    assert state.ranks[0].step is None and [point.step for point in state.series][-1] == 20


def test_the_last_words_of_a_rank_that_fell_silent_stay(tmp_path: Path) -> None:
    run = SpokenRun(ranks=2)
    for _ in range(10):
        run.second()
    for _ in range(300):  # rank 1 is stopped; the probe and rank 0 go on
        run.jump(1)
        run.beat(0)
        run.node()
    with Playback(recorded(tmp_path, run, packed=True)) as playback:
        state = playback.state_at(playback.frames.count - 1)
    assert state.ranks[1].heartbeat is not None and state.ranks[1].heartbeat.step == 11
    condition = condition_of(state)
    assert condition.name == "stalled" and "rank 1" in condition.text and "5m 0" in condition.text


def test_nobody_is_silent_where_samples_are_a_minute_apart(tmp_path: Path) -> None:
    run = SpokenRun(ranks=2)
    for _ in range(200):
        run.jump(59)
        run.second()
    write(tmp_path, run)
    with closing(create(tmp_path / "recording.sqlite")) as database:
        pack(database, run.wall_s + 2 * 86_400)
    with Playback(tmp_path) as playback:
        assert playback.frames.count == pytest.approx(200, abs=3)
        state = playback.state_at(5)
        for frame in range(6, playback.frames.count):
            playback.advance(state, playback.frames.span(frame - 1)[1], playback.frames.span(frame)[1])
            assert condition_of(state).name == "running", frame


def test_all_phases_and_collectives_of_the_last_minutes_are_played(tmp_path: Path) -> None:
    run = SpokenRun(ranks=2)
    for _ in range(30):
        run.second()
    said = run.take()
    table = timeline.TimelineTable()
    with closing(create(tmp_path / "recording.sqlite")) as database:
        insert(database, [one for one in said if not isinstance(one[2], Phases | Collectives)])
        for wall, source, message in said:
            table.add(1, wall, source, message)
            with database:
                table.write(database)
    with Playback(tmp_path) as playback:
        state = playback.state_at(playback.frames.count - 1)
    assert state.waits.window().steps >= 10 and len(state.ranks[1].spans) > 100


def test_the_moment_of_a_step(tmp_path: Path) -> None:
    run = SpokenRun()
    for _ in range(20):
        run.second()
    with Playback(write(tmp_path, run)) as playback:
        assert playback.step_at(1) == BEGIN_S and playback.step_at(11) == BEGIN_S + 10
        assert playback.step_at(21) is None


def test_an_empty_recording_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "recording.sqlite").touch()
    with Playback(tmp_path) as playback:
        assert playback.frames.count == 0 and not playback.state_at(0).ranks
    with pytest.raises(FileNotFoundError):
        Playback(tmp_path / "nowhere")


def test_a_recording_of_the_older_form_is_played(tmp_path: Path) -> None:
    run = SpokenRun()
    for _ in range(20):
        run.second()
    write(tmp_path, run)
    with closing(create(tmp_path / "recording.sqlite")) as database, database:
        database.execute("DROP TABLE blocks")
        database.execute("DROP INDEX by_kind")
        database.execute("DROP TABLE timeline")
    with Playback(tmp_path) as playback:
        assert playback.state_at(playback.frames.count - 1).step == 20
