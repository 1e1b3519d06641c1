"""The life of an alert: pending, firing, resolved; its messages and events."""

from __future__ import annotations

from typing import Any

from runtime.config.outputs import AlertConfig
from runtime.wire.judgement import Verdict
from runtime.wire.messages import Event, RunStatus
from tests.harness.fakehub import hello, step_result
from tests.unit.diagnose.test_hang import PlayedHub
from zerotop.alerts.watch import REFRESH_S, RESOLVE_S, AlertWatch
from zerotop.state.run import RunState


class Played:
    """A run of two ranks, a clock, and its alerts."""

    def __init__(self, *rules: str, **config: Any) -> None:
        self.now = 0.0
        state = RunState()
        state.apply(RunStatus(name="r1", state="running", attempt=1))
        state.apply(hello(0))
        self.hub = PlayedHub(state)
        alerts = [AlertConfig(rule=rule, **config) for rule in rules]
        self.watch = AlertWatch(self.hub, alerts, clock=lambda: self.now)  # type: ignore[arg-type]
        self.step = 0

    @property
    def state(self) -> RunState:
        return self.hub.state

    def seconds(self, count: float, loss: float | None = None) -> list[str]:
        """The events of the next seconds, with a step of this loss in each."""
        before = len(self.hub.events)
        for _ in range(int(count)):
            if loss is not None:
                self.step += 1
                self.state.apply(step_result(step=self.step, loss=loss))
            self.watch.look()
            self.now += 1.0
        return [f"{event.severity}: {event.text}" for event in self.hub.events[before:]]

    def is_(self, name: str) -> str:
        return self.state.alerts[name].state if name in self.state.alerts else "inactive"


def test_an_alert_fires_once_and_is_resolved_when_it_has_been_over_for_a_while() -> None:
    run = Played("loss > 10", severity="error")
    assert run.seconds(5, loss=2.0) == []
    assert run.seconds(20, loss=12.0) == ["error: loss > 10: loss 12"]
    assert run.is_("loss > 10") == "firing"
    assert run.seconds(RESOLVE_S - 2, loss=9.0) == []
    assert run.seconds(1, loss=11.0) == []
    assert run.seconds(RESOLVE_S - 1, loss=9.0) == []
    assert run.seconds(3, loss=9.0) == ["info: loss > 10: resolved after 38 s; loss 9.0000"]
    assert run.is_("loss > 10") == "resolved"
    assert run.seconds(1, loss=12.0) == ["error: loss > 10: loss 12"]
    fired = run.hub.events[0]
    assert fired.what == "alert" and fired.data == {"alert": "loss > 10", "alert_state": "firing", "ranks": []}


def test_for_asks_that_it_holds_all_that_time() -> None:
    rule = "loss > 10 for 5s"
    run = Played(rule)
    assert run.seconds(4, loss=12.0) == [] and run.is_(rule) == "pending"
    assert run.seconds(1, loss=2.0) == [] and run.is_(rule) == "inactive"
    assert run.seconds(5, loss=12.0) == [] and run.is_(rule) == "pending"
    assert run.seconds(1, loss=12.5) == [f"warning: {rule}: loss 12.5"]


def test_until_is_another_threshold() -> None:
    rule = "loss > 10 until loss < 8"
    run = Played(rule)
    assert len(run.seconds(1, loss=11.0)) == 1
    assert run.seconds(100, loss=9.0) == [] and run.is_(rule) == "firing"
    assert run.seconds(1, loss=7.5) == [f"info: {rule}: resolved after 1m 41s; loss 7.5000"]


def test_no_step_counts_only_while_steps_are_to_be_taken() -> None:
    rule = "no step for 60s"
    run = Played(rule)
    run.seconds(10, loss=1.0)
    assert run.seconds(50) == []
    run.state.apply(RunStatus(name="r1", state="paused", attempt=1))
    assert run.seconds(600) == []
    run.state.apply(RunStatus(name="r1", state="running", attempt=1))
    assert run.seconds(59) == []
    assert run.seconds(2) == [f"warning: {rule}: no step for 1m 00s, at step 10"]
    assert run.seconds(RESOLVE_S + 1, loss=1.0)[0].startswith(f"info: {rule}: resolved after")


def test_no_step_fires_for_a_run_that_never_takes_one() -> None:
    run = Played("no step for 5m")
    run.state.apply(RunStatus(name="r1", state="starting", attempt=1))
    assert run.seconds(299) == []
    assert len(run.seconds(3)) == 1


def test_a_verdict_that_changes_is_told_every_time_and_not_when_only_its_figures_do() -> None:
    run = Played("verdict changes")

    def verdict(what: str, text: str, *ranks: int) -> list[str]:
        severity = "warning" if what == "straggler" else "info"
        run.state.apply(Verdict(what=what, severity=severity, text=text, ranks=list(ranks)))
        return run.seconds(5)

    assert verdict("starting", "loading") == []
    assert verdict("checkpoint", "a checkpoint is being written") == []
    assert verdict("healthy", "healthy: 1 s a step") == []
    assert verdict("straggler", "rank 1 is slow", 1) == [
        "warning: verdict changes: from healthy to straggler (rank 1): rank 1 is slow"
    ]
    assert verdict("straggler", "rank 1 is slower", 1) == []
    assert len(verdict("straggler", "rank 0 is slow", 0)) == 1
    assert run.seconds(70) == ["info: verdict changes: resolved after 1m 11s; the verdict is straggler"]
    assert verdict("healthy", "healthy: 1 s a step") == [
        "warning: verdict changes: from straggler to healthy: 1 s a step"
    ]
    assert verdict("checkpoint", "a checkpoint is being written") == []


def test_figures_of_a_firing_alert_are_published_anew_without_an_event() -> None:
    run = Played("loss > 10", name="loss is high")
    run.seconds(2, loss=11.0)
    assert run.seconds(REFRESH_S + 1, loss=15.0) == []
    alert = run.state.alerts["loss is high"]
    assert (alert.text, alert.value, alert.rule, alert.state) == ("loss 15", 15.0, "loss > 10", "firing")


def test_an_ended_run_is_not_judged_any_more() -> None:
    run = Played("loss > 10")
    run.state.apply(RunStatus(name="r1", state="finished", attempt=1))
    assert run.seconds(5, loss=12.0) == [] and run.state.alerts == {}


def test_a_late_screen_gets_the_alerts() -> None:
    run = Played("loss > 10", "loss > 100 for 5s")
    run.seconds(1, loss=200.0)
    late = RunState()
    late.apply_all(run.state.snapshot_messages(), 0)
    assert [alert.name for alert in late.firing()] == ["loss > 10"]
    assert late.alerts["loss > 100 for 5s"].state == "pending"
    assert all(isinstance(event, Event) for event in run.hub.events)


def test_no_step_is_expected_of_a_command_whose_ranks_never_report() -> None:
    run = Played("no step for 60s")
    run.state.ranks.clear()
    assert run.seconds(600) == []
