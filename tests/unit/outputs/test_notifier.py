"""Who is told what, and how often."""

from __future__ import annotations

from typing import Any

from runtime.config.outputs import NotifyConfig
from zerotop.outputs.conditions import Notice
from zerotop.outputs.notifier import LONGEST_TEXT, Notifier, document


class Played:
    """A notifier whose receiver keeps what it is given."""

    def __init__(self, **config: Any) -> None:
        self.now = 0.0
        self.got: list[dict[str, Any]] = []
        self.reports: list[str] = []
        self.full = False
        self.name = "webhook http://host"
        fields = {"webhook": "http://host", "every": 600.0, **config}
        self.notifier = Notifier(
            NotifyConfig(**fields), "r1", "box", self, self.reports.append, clock=lambda: self.now  # type: ignore[arg-type]
        )  # fmt: skip

    def put(self, document: dict[str, Any]) -> bool:
        if not self.full:
            self.got.append(document)
        return not self.full

    def tell(self, what: str, text: str = "x", **more: Any) -> list[str]:
        before = len(self.got)
        self.notifier.tell([Notice(what, text, **more)])
        return [f"{one['state']} {one['what']}" for one in self.got[before:]]


def test_only_what_is_asked_for_is_told() -> None:
    run = Played(on=["hang", "memory"])
    assert run.tell("hang") == ["firing hang"]
    assert run.tell("nan") == []
    assert run.tell("memory", is_alert=True) == ["firing memory"]
    assert run.tell("other", is_alert=True) == []
    assert run.tell("verdict hang", is_verdict=True) == []
    assert Played().tell("verdict hang", is_verdict=True) == ["firing verdict hang"]
    every = Played(on=["alert"])
    assert every.tell("other", is_alert=True) == ["firing other"]
    assert every.tell("hang") == []


def test_the_same_thing_is_told_at_most_once_in_a_while_and_then_how_often_it_was() -> None:
    run = Played(on=["alert"])
    assert run.tell("high", is_alert=True) == ["firing high"]
    for _ in range(3):
        run.now += 100
        assert run.tell("high", is_alert=True) == []
    assert run.tell("low", is_alert=True) == ["firing low"]  # another thing
    run.now += 600
    assert run.tell("high", "loss 12", is_alert=True) == ["firing high"]
    assert run.got[-1]["suppressed"] == 3
    assert run.got[-1]["text"].endswith("high: loss 12 (3 more since the last notification)")


def test_the_end_of_the_run_is_always_told() -> None:
    run = Played(on=["failed", "finished"], every=1e9)
    assert run.tell("failed") == ["ended failed"]
    assert run.tell("failed") == ["ended failed"]


def test_that_it_is_over_is_told_to_those_who_were_told_that_it_began() -> None:
    run = Played(on=["alert"])
    assert run.tell("high", is_alert=True, over=True) == []
    run.tell("high", is_alert=True)
    assert run.tell("high", is_alert=True, over=True) == ["over high"]
    assert run.tell("high", is_alert=True, over=True) == []
    run.tell("high", is_alert=True)  # within the rate: not told
    assert run.tell("high", is_alert=True, over=True) == []
    silent = Played(on=["alert"], resolved=False)
    silent.tell("high", is_alert=True)
    assert silent.tell("high", is_alert=True, over=True) == []


def test_a_receiver_that_does_not_keep_up_is_reported_once() -> None:
    run = Played(on=["alert"], every=0.0)
    run.full = True
    for index in range(5):
        run.tell(f"a{index}", is_alert=True)
    assert run.reports == ["webhook http://host does not keep up: notifications are dropped"]


def test_the_document() -> None:
    notice = Notice("hang", "rank 1\x1b[31m is stuck\nfor long", "error", (1,), 7)
    assert document("r1", "box", notice, wall_s=5.0) == {
        "text": "✖ r1: hang: rank 1 is stuck\nfor long",
        "content": "✖ r1: hang: rank 1 is stuck\nfor long",
        "title": "r1: hang",
        "description": "rank 1 is stuck\nfor long",
        "run": "r1",
        "host": "box",
        "what": "hang",
        "state": "firing",
        "severity": "error",
        "step": 7,
        "ranks": [1],
        "suppressed": 0,
        "wall_s": 5.0,
    }
    assert len(document("r1", "box", Notice("hang", "y" * 10_000))["content"]) < LONGEST_TEXT + 100
