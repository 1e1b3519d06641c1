"""What comes next, what happened when, where settings came from, and what operations cost."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Ack, Collectives, Command, CommandRecord
from tests.tui.scripted_run import ScriptedRun
from zerotop.state.marks import step_marks
from zerotop.state.operations import operations
from zerotop.state.outlook import coming, next_boundary
from zerotop.state.progress import progress
from zerotop.state.run import RunState
from zerotop.state.settings import known_values, setting_values


def applied(run: ScriptedRun, name: str, step: int, **arguments: object) -> None:
    command = Command(id=f"{name}{step}", name=name, arguments=arguments, who="me@box", number=1)
    ack = Ack(id=command.id, number=1, state="applied", step=step, wall_s=run.wall_s)
    run.say(CommandRecord(command=command, ack=ack))


def with_knobs(run: ScriptedRun, **knobs: object) -> None:
    hello = run.state.ranks[0].hello
    assert hello is not None
    run.say(hello.model_copy(update={"knobs": {**hello.knobs, **knobs}}))


def test_checkpoint_evaluation_and_end_come_in_their_order() -> None:
    run = ScriptedRun(finetune=True, steps=210)
    run.steps(110)
    with_knobs(run, checkpoint_interval=40)
    found = coming(run.state, progress(run.state))
    assert [(one.what, one.step, one.steps) for one in found] == [
        ("checkpoint", 120, 10), ("evaluation", 125, 15), ("end", 210, 100),
    ]  # fmt: skip
    assert found[0].text == "checkpoint in 10 steps" and found[0].seconds == pytest.approx(4.0, rel=0.1)
    applied(run, "set", 110, checkpoint_interval=0)
    assert [one.what for one in coming(run.state, progress(run.state))] == ["evaluation", "end"]
    assert next_boundary(run.state) == 111


def test_a_checkpoint_never_comes_after_the_end() -> None:
    run = ScriptedRun(steps=130)
    run.steps(110)
    with_knobs(run, checkpoint_interval=100)
    assert [(one.what, one.step) for one in coming(run.state, progress(run.state))] == [
        ("checkpoint", 130),
        ("end", 130),
    ]


def test_marks_are_checkpoints_pauses_settings_and_restarts() -> None:
    run = ScriptedRun()
    run.steps(60)
    applied(run, "pause", 30)
    applied(run, "set", 40, lr_factor=0.5)
    applied(run, "checkpoint", 45)
    run.event("overflow", "loss scale halved", step=20)
    found = [(mark.step, mark.kind) for mark in step_marks(run.state)]
    assert found == [(20, "trouble"), (30, "pause"), (40, "setting"), (50, "checkpoint")]
    assert step_marks(run.state)[2].text == "lr_factor=0.5 by me@box"
    run.status("running", restarts=1, restart_reason="rank 1 was killed")
    assert ("restart", "restart 1: rank 1 was killed") in {(mark.kind, mark.text) for mark in step_marks(run.state)}


def test_a_setting_knows_who_set_it_and_when() -> None:
    run = ScriptedRun()
    run.steps(5)
    assert setting_values(run.state)["log_interval"].step is None
    applied(run, "set", 4, log_interval=7)
    value = setting_values(run.state)["log_interval"]
    assert (value.value, value.step, value.who) == (7, 4, "me@box") and known_values(run.state)["log_interval"] == 7


def test_operations_sum_what_a_step_costs() -> None:
    run = ScriptedRun(ranks=4)
    run.steps(30)
    found = operations(run.state)
    assert {one.op for one in found} == {"reduce", "gather"}
    for one in found:
        assert one.bytes > 0 and one.per_step >= 1 and one.skew_ms > one.transfer_ms > 0
        assert one.bus_bytes_per_s is not None and one.best_bus_bytes_per_s is not None
        assert one.bus_bytes_per_s <= one.best_bus_bytes_per_s * 1.5
    assert [one.exposed_per_step_ms for one in found] == sorted((o.exposed_per_step_ms for o in found), reverse=True)


def test_collectives_that_are_only_counted_have_no_times() -> None:
    """Those of trainers that are not ours."""
    run = ScriptedRun(ranks=2)
    for rank in range(2):
        counted = [("all_reduce", 400, 3, None), ("all_reduce", 80, 1, 2.0 - rank)]
        run.say(Collectives(rank=rank, step=1, records=[], counted=counted))
    found = {one.bytes: one for one in operations(run.state)}
    assert (found[400].per_step, found[400].transfer_ms, found[400].exposed_ms) == (3, None, None)
    assert found[400].bus_bytes_per_s is None and found[400].exposed_per_step_ms == 0
    assert found[80].transfer_ms == 1.0 and found[80].bus_bytes_per_s == pytest.approx(80e3)
    late = RunState()
    for message in run.state.snapshot_messages():
        late.apply(message)
    assert operations(late) == operations(run.state)  # a screen that comes later has them, too
    assert not run.state.waits.meetings and run.state.ranks[0].comm_bytes == 1280


def test_the_late_rank_is_late_in_every_step_and_the_others_wait() -> None:
    run = ScriptedRun(ranks=4)
    run.steps(70)
    late, waiting = run.state.waits.lateness_ms(), run.state.waits.waiting_ms()
    assert len(late) == 69 and min(late) == 1, "more steps are kept than any figure is over"
    for step in late:
        assert max(late[step], key=lambda rank: late[step][rank]) == 3 and waiting[step][3] == 0
        assert all(waiting[step][rank] > 10 for rank in range(3))
    assert run.state.waits.window().steps == 20
