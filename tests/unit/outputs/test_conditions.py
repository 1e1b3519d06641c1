"""What there is to tell, from the state alone: once when it begins, once when it is over."""

from __future__ import annotations

import math
from typing import Any

from runtime.wire.judgement import Alert, Verdict
from runtime.wire.messages import Event, RunStatus
from tests.harness.fakehub import hello, step_result
from zerotop.outputs.conditions import Conditions
from zerotop.state.run import RunState


class Played:
    def __init__(self) -> None:
        self.state = RunState()
        self.state.apply(hello(0))
        self.status("running")
        self.conditions = Conditions()
        assert self.look() == []

    def status(self, state: str, **more: Any) -> None:
        self.state.apply(RunStatus.model_validate({"name": "r1", "state": state, "attempt": 1, **more}))

    def look(self) -> list[tuple[str, str, str]]:
        """(what, text, over)"""
        return [(one.what, one.text, "over" if one.over else "") for one in self.conditions.look(self.state)]

    def alert(self, state: str, text: str = "loss 12", since: float = 1.0) -> None:
        fields = {"name": "high", "rule": "loss > 10", "state": state, "text": text, "since_wall_s": since}
        self.state.apply(Alert.model_validate(fields))


def test_an_alert_begins_and_ends_once() -> None:
    run = Played()
    run.alert("pending")
    assert run.look() == []
    run.alert("firing")
    assert run.look() == [("high", "loss 12", "")]
    run.alert("firing", "loss 13")
    assert run.look() == []
    run.alert("firing", "loss 14", since=2.0)
    assert run.look() == [("high", "loss 14", "")]
    run.alert("resolved", "loss 9")
    assert run.look() == [("high", "over at step 0; loss 9", "over")]
    assert run.look() == []


def test_a_hang_is_told_without_the_path_of_its_stacks() -> None:
    run = Played()
    run.state.apply(Verdict(what="hang", severity="error", ranks=[1], text="x"))
    run.status("running", reason="hang: rank 1 has not entered all_reduce; stacks: /home/somebody/stacks-1.txt")
    notice, verdict = run.conditions.look(run.state)
    assert (notice.what, notice.text, notice.ranks) == ("hang", "rank 1 has not entered all_reduce", (1,))
    assert verdict.is_verdict and not notice.is_verdict
    assert notice.severity == "error"
    run.status("running")
    assert run.look() == [("hang", "over at step 0", "over")]


def test_a_verdict_is_told_when_it_is_bad_news_and_when_that_is_over() -> None:
    run = Played()

    def judged(what: str, severity: str, ranks: tuple[int, ...] = (), since: float = 1.0) -> list[tuple[str, str, str]]:
        message = {"what": what, "severity": severity, "text": f"{what} it is", "ranks": ranks, "since_wall_s": since}
        run.state.apply(Verdict.model_validate(message))
        return run.look()

    assert judged("healthy", "info") == judged("checkpoint", "info") == []
    assert judged("straggler", "warning", (1,)) == [("verdict straggler", "straggler it is", "")]
    assert judged("straggler", "warning", (1,)) == []
    assert judged("straggler", "warning", (0,), since=2.0) == [("verdict straggler", "straggler it is", "")]
    told = [("verdict hang", "hang it is", ""), ("verdict straggler", "over at step 0; hang it is", "over")]
    assert judged("hang", "error", (1,), since=3.0) == told
    assert judged("offload-bound", "info") == [("verdict hang", "over at step 0; offload-bound it is", "over")]
    assert judged("failed", "error") == []  # the end of the run, or its restart, is told anyway


def test_a_loss_that_is_not_finite_is_told_also_when_other_steps_have_come_since() -> None:
    run = Played()
    run.state.apply(step_result(step=4, loss=math.nan))
    assert run.look() == [("nan", "step 4: loss NaN, gradient norm 0.5000", "")]
    run.state.apply(step_result(step=5))
    assert run.look() == []  # no word that it is over: the weights may be ruined
    run.state.apply(Event(rank=1, what="not finite", text="the loss is not finite", step=6, wall_s=5.0))
    run.state.apply(step_result(step=7))
    assert run.look() == [("nan", "the loss is not finite", "")]
    assert run.look() == []


def test_of_ranks_that_tell_of_nan_the_first_is_named() -> None:
    """It spreads to the others in a step, and they may be heard first."""
    run = Played()
    for rank, step in ((0, 7), (1, 6), (2, 7)):
        run.state.apply(Event(rank=rank, what="not finite", text=f"step {step}", step=step, wall_s=5.0 + rank))
    assert run.look() == [("nan", "step 6", "")]


def test_an_overflow_under_fp16_is_no_nan() -> None:
    run = Played()
    run.state.apply(step_result(grad_norm=math.inf, loss_scale=65536.0, skipped=True))
    assert run.look() == []
    run.state.apply(step_result(step=2, grad_norm=math.inf))
    assert [what for what, _, _ in run.look()] == ["nan"]


def test_a_restart_is_told_and_not_one_from_before() -> None:
    run = Played()
    run.status("restarting", restarts=1, restart_reason="rank 1 was killed", failed_rank=1)
    assert run.look() == [("restarted", "rank 1 was killed", "")]
    assert run.look() == []
    late = Conditions()
    assert late.look(run.state) == []


def test_the_end_is_told_once_and_nothing_is_over_then() -> None:
    run = Played()
    run.alert("firing")
    run.look()
    run.status("failed", reason="rank 1 was killed by SIGKILL", failed_rank=1, exit_code=-9, step=7)
    assert run.look() == [("failed", "failed at step 7: rank 1 was killed by SIGKILL", "")]
    run.alert("resolved")
    assert run.look() == []
    assert run.conditions.lost(run.state) == []


def test_a_finished_run_is_good_news() -> None:
    run = Played()
    run.status("finished", step=100)
    (notice,) = run.conditions.look(run.state)
    assert (notice.severity, notice.text, notice.ends_run) == ("info", "finished at step 100", True)


def test_a_supervisor_that_is_gone_counts_as_a_failure() -> None:
    run = Played()
    run.state.apply(step_result(step=7))
    (notice,) = run.conditions.lost(run.state)
    assert (notice.what, notice.severity, notice.step) == ("failed", "error", 7)
    assert run.conditions.lost(run.state) == []
