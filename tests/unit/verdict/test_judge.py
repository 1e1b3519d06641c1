"""The verdict comes soon, does not flicker, and is published once."""

from __future__ import annotations

import pytest

from runtime.wire.judgement import TimeReport, Verdict
from tests.unit.diagnose.test_hang import PlayedHub
from tests.unit.state.test_stall import WORLD, a_run, beat, stuck
from tests.unit.verdict.test_rules import MIB, USUAL, met, trained
from zerotop.diagnose.verdicts import REFRESH_S, VerdictWatch
from zerotop.documents import status_document, status_text
from zerotop.state.run import RunState
from zerotop.verdict import judge as module
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding, What
from zerotop.verdict.judge import CALM_S, CLEAR_S, CONFIRM_S, URGENT, Judge, Rule

SLOW = Finding("straggler", "rank 1 is slow", ranks=(1,))
HUNG = Finding("hang", "rank 1 is missing", "error", (1,))


class Played:
    """A judge whose only rule says what `found` is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: Finding | None = None
        self.now_s = 0.0
        self.run = a_run()
        monkeypatch.setattr(module, "URGENT", (self.rule,))
        self.phase("backward")
        self.judge = Judge()

    def rule(self, figures: Figures) -> Finding | None:
        return self.found

    def phase(self, phase: str) -> None:
        for rank in range(WORLD):
            beat(self.run, rank, 1, 1, 0.0, phase=phase)

    def after(self, seconds: float, found: Finding | None = None) -> str:
        """The verdict after looking twice a second at `found`."""
        self.found = found
        until = self.now_s + seconds
        while self.now_s < until:
            self.now_s += 0.5
            verdict = self.judge.look(self.run, self.now_s)
        return verdict.what


def test_a_warning_needs_a_second_look_and_bad_news_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    assert played.after(1.0) == "healthy"
    assert played.after(0.5, SLOW) == "healthy"
    assert played.after(0.5) == "healthy"
    assert played.after(CONFIRM_S + 0.5, SLOW) == "straggler"
    assert played.after(0.5, HUNG) == "hang"
    assert played.after(0.5) == "healthy"


def test_a_warning_stays_while_it_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.after(1.0)
    played.after(CONFIRM_S + 0.5, SLOW)
    for _ in range(4):
        assert played.after(CLEAR_S - 1.0) == "straggler"
        assert played.after(0.5, SLOW) == "straggler"
    assert played.after(CLEAR_S + 1.0) == "healthy"


def test_a_short_checkpoint_is_no_verdict_and_a_warning_outlives_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.after(1.0)
    played.phase("checkpoint")
    assert played.after(CALM_S - 0.5) == "healthy"
    assert played.after(1.0) == "checkpoint"
    played.phase("backward")
    assert played.after(0.5) == "healthy"
    played.after(CONFIRM_S + 0.5, SLOW)
    played.phase("checkpoint")
    assert played.after(30.0) == "straggler"
    played.phase("backward")
    assert played.after(CLEAR_S / 2) == "straggler" and played.after(CLEAR_S) == "healthy"


def test_the_most_urgent_finding_is_the_verdict() -> None:
    run = a_run()
    stuck(run)
    names = [rule.__name__ for rule in URGENT]
    assert names.index("find_hang") < names.index("find_straggler")
    assert Judge().look(run, 0.0).what == "hang"


def test_of_what_all_ranks_suffer_from_the_costliest_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"contention": 0.3, "data starvation": 0.4}

    def rule(what: str) -> Rule:
        return lambda figures: Finding(what, what, cost=cost[what])  # type: ignore[arg-type]

    monkeypatch.setattr(module, "SHARED", (rule("contention"), rule("data starvation")))
    judge, run = Judge(), a_run()
    assert judge.look(run, 0.0).what == "data starvation"
    cost["contention"] = 0.5
    assert [judge.look(run, at_s).what for at_s in (1.0, 2.0, 3.0)][-1] == "data starvation"  # not by that much
    cost["contention"] = 0.7
    assert [judge.look(run, at_s).what for at_s in (4.0, 5.0, 6.0)][-1] == "contention"


def test_the_hub_publishes_a_change_once_and_figures_now_and_then() -> None:
    hub = PlayedHub(a_run())
    watch = VerdictWatch(hub)  # type: ignore[arg-type]
    for rank in range(WORLD):
        beat(hub.state, rank, 1, 1, 0.0)

    def told() -> list[str]:
        return [message.what for message in hub.said if isinstance(message, Verdict)]

    for second in range(3):
        watch.look(float(second))
    assert told() == ["healthy"] and not hub.events
    stuck(hub.state)
    watch.look(3.0)
    assert told() == ["healthy", "hang"]
    assert [(event.what, event.severity) for event in hub.events] == [("verdict", "error")]
    hub.state.hub_now_ns += 10**9
    watch.look(4.0)
    assert told() == ["healthy", "hang"]
    watch.look(3.0 + REFRESH_S)
    assert told() == ["healthy", "hang", "hang"] and len(hub.events) == 1
    for rank in range(WORLD):
        beat(hub.state, rank, 1533, 1533, 0.0)
    watch.look(9.0)
    assert hub.events[-1].text.startswith("over: hang; healthy")


@pytest.mark.parametrize("what", ["healthy", "offload-bound", "paused", "checkpoint", "compiling", "starting", "ended"])
def test_that_bad_news_is_over_is_an_event_whatever_comes_next(monkeypatch: pytest.MonkeyPatch, what: What) -> None:
    hub = PlayedHub(a_run())
    watch = VerdictWatch(hub)  # type: ignore[arg-type]
    found = iter([HUNG, Finding(what, "and now this", "info"), Finding("healthy", "healthy", "info")])
    monkeypatch.setattr(watch._judge, "look", lambda state, now_s: next(found))
    for second in range(3):
        watch.look(float(second))
    assert [event.text for event in hub.events] == ["rank 1 is missing", "over: hang; and now this"]


def test_status_begins_with_the_verdict_and_what_to_do() -> None:
    run: RunState = a_run()
    run.apply(SLOW.message(10, 1.0).model_copy(update={"advice": "Look at rank 1."}))
    document = status_document(run)
    assert document["verdict"]["what"] == "straggler" and document["verdict"]["ranks"] == [1]
    assert status_text(document).splitlines()[:2] == ["rank 1 is slow", "  Look at rank 1."]


def test_the_hub_says_where_the_time_goes_for_those_who_come_late() -> None:
    hub = PlayedHub(a_run())
    watch = VerdictWatch(hub)  # type: ignore[arg-type]
    trained(hub.state, dict.fromkeys(range(WORLD), USUAL))
    met(hub.state, last=2, wait_us=80_000)
    watch.look(0.0)
    late = RunState()
    late.apply_all(hub.state.snapshot_messages(), 0)
    report = late.time_report
    assert report is not None and sum(report.parts_ms[0].values()) == pytest.approx(400.0)
    (kind,) = report.transfers
    assert (kind.op, kind.bytes, kind.count, kind.now_us) == ("reduce", MIB, 10, 1000)
    document = status_document(late)
    assert document["ranks"][0]["parts_ms"]["compute"] == 300.0 and document["collectives"][0]["op"] == "reduce"
    watch.look(1.0)
    assert sum(isinstance(message, TimeReport) for message in hub.said) == 1
