"""What is true of a run beside its status, and what may therefore not be shown: an ETA, a part of the speed."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Ack, Command, CommandRecord, Goodbye, RunStatus, StepResult
from tests.unit.state.test_stall import S, a_run, beat, hello, stuck
from zerotop.documents import status_document, status_text
from zerotop.state.condition import condition_of
from zerotop.state.progress import progress
from zerotop.state.run import RunState


def moving() -> RunState:
    run = a_run()
    for rank in range(3):
        run.apply(hello(rank).model_copy(update={"steps": 100}))
        beat(run, rank, 10, 9, 0.1)
    return run


def in_state(name: str) -> RunState:
    run = moving()
    run.apply(RunStatus(name="q1", state=name))  # type: ignore[arg-type]
    return run


def test_a_run_that_moves_is_running_and_has_an_eta() -> None:
    condition = condition_of(moving())
    assert (condition.name, condition.text, condition.moving) == ("running", "", True)
    assert progress(moving()).eta_s == pytest.approx(90 * 0.4)


def test_a_stopped_rank_is_told_and_there_is_no_eta() -> None:
    run = moving()
    run.hub_now_ns += 111 * S
    for rank in (0, 2):
        beat(run, rank, 10, 9, 0.1)
    condition = condition_of(run)
    assert (condition.name, condition.moving) == ("stalled", False)
    assert condition.text == "nothing heard from rank 1 for 1m 51s"
    document = status_document(run)
    assert (document["state"], document["condition"], document["eta_s"]) == ("running", "stalled", None)
    assert "q1: running (stalled: nothing heard from rank 1 for 1m 51s), step 10" in status_text(document)
    run.apply(Goodbye(rank=1, outcome="finished", step=10, wall_s=0))
    assert condition_of(run).name == "running"  # it left, and nobody expects a word of it


def test_ranks_that_stand_still_are_told() -> None:
    run = a_run()
    stuck(run)
    condition = condition_of(run)
    assert condition.name == "stalled" and "rank 1 has not entered collective 1532" in condition.text


@pytest.mark.parametrize("name", ["starting", "paused", "restarting", "stopping", "running"])
def test_only_what_runs_moves_and_only_while_it_can_be_heard(name: str) -> None:
    run = in_state(name)
    assert condition_of(run).name == name and condition_of(run).moving == (name == "running")
    assert (progress(run).eta_s is not None) == (name == "running")
    lost = condition_of(run, "lost: nothing heard for 7 s")
    assert (lost.name, lost.moving) == ("unknown", False)
    assert lost.text == f"the supervisor can't be reached (nothing heard for 7 s); the run was {name}"
    assert progress(run, "lost: nothing heard for 7 s").eta_s is None


@pytest.mark.parametrize("name", ["finished", "stopped", "aborted", "failed"])
def test_a_run_that_is_over_is_only_that(name: str) -> None:
    run = in_state(name)
    run.hub_now_ns += 999 * S
    assert condition_of(run, "lost: x").name == name and progress(run).eta_s is None


def test_a_rank_that_has_left_works_on_no_further_step() -> None:
    run = moving()
    assert run.ranks[0].current_step == 11
    run.apply(Goodbye(rank=0, outcome="finished", step=10, wall_s=0))
    assert run.ranks[0].current_step == 10


def test_the_speed_of_some_ranks_is_not_the_runs() -> None:
    run = a_run(steps=0)
    for rank, told in ((0, None), (1, None), (2, 30.0)):
        run.apply(StepResult(rank=rank, step=1, loss=1, lr=1, grad_norm=1, step_ms=9, tokens_per_s=10.0, end_ns=0))
        assert progress(run).tokens_per_s == told
    for attempt in (1, 2):
        run.apply(RunStatus(name="q1", state="restarting", attempt=attempt))
    assert progress(run).tokens_per_s is None


def test_a_command_says_what_it_waits_for_once_the_ranks_have_taken_it_up() -> None:
    run = moving()
    command = Command(id="c", name="checkpoint", number=1)
    run.apply(CommandRecord(command=command, ack=Ack(id="c", number=1, state="accepted")))
    assert run.pending_text() == "checkpoint: waiting for a step boundary"
    writing = Ack(id="c", number=1, state="accepted", step=10, reason="the checkpoint of step 10 is being written")
    run.apply(CommandRecord(command=command, ack=writing))
    assert run.pending_text() == "checkpoint: the checkpoint of step 10 is being written"
    assert "#1 checkpoint: the checkpoint of step 10 is being written" in status_text(status_document(run))
    run.apply(CommandRecord(command=command, ack=Ack(id="c", number=1, state="applied", step=10)))
    assert run.pending_text() == ""
