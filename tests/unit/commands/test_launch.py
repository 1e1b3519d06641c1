"""What `launch --detach` says about a start, and when it no longer waits for it."""

from __future__ import annotations

from runtime.wire.judgement import Verdict
from tests.unit.state.test_stall import hello
from zerotop.commands.launch import STUCK_S, TOLD_AGAIN_S, TOLD_FIRST_S, _Start
from zerotop.state.run import RunState
from zerotop.verdict.calm import calm
from zerotop.verdict.figures import History


def judged(run: RunState) -> RunState:
    """With the verdict that the hub would publish."""
    found = calm(History().figures(run, None, 0.0))
    run.apply(Verdict(what=found.what, text=found.text))
    return run


def test_a_start_is_told_after_a_second_and_when_it_changes() -> None:
    start, run = _Start("q1", 0.0), judged(RunState())
    assert start.look(run, TOLD_FIRST_S - 0.1) == []
    assert start.look(run, TOLD_FIRST_S) == ["q1: the ranks are starting: none has reported yet (1 s)"]
    assert start.look(run, 5.0) == []
    run.apply(hello(0))
    assert start.look(judged(run), 6.0) == ["q1: the ranks are starting: ranks 1, 2 have not reported yet (6 s)"]
    assert start.look(run, 6.0 + TOLD_AGAIN_S) == [
        "q1: the ranks are starting: ranks 1, 2 have not reported yet (36 s)"
    ]
    assert not start.stuck


def test_a_rank_that_does_not_report_is_waited_for_only_so_long_after_the_others() -> None:
    start, run = _Start("q1", 0.0), judged(RunState())
    start.look(run, 500.0)
    assert not start.stuck  # nobody has said how many ranks there are: torch may take long to import
    for number, at_s in ((0, 500.0), (1, 530.0)):
        run.apply(hello(number))
        start.look(judged(run), at_s)
    assert start.look(run, 530.0 + STUCK_S - 1) and not start.stuck
    lines = start.look(run, 530.0 + STUCK_S)
    assert start.stuck and "`zerotop stacks q1`" in lines[-1] and "still starting after 9m 50s" in lines[-1]


def test_ranks_that_all_have_reported_may_take_as_long_as_they_need() -> None:
    start, run = _Start("q1", 0.0), RunState()
    for number in range(3):
        run.apply(hello(number))
    start.look(judged(run), 1.0)
    start.look(run, 100 * STUCK_S)
    assert not start.stuck
