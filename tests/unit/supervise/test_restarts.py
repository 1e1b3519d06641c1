"""When a failed attempt is followed by another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.config.zerotop import RestartsConfig
from runtime.wire.messages import Goodbye
from zerotop.diagnose.evidence import FailureEvidence
from zerotop.diagnose.outcome import decide
from zerotop.supervise.restarts import AGAIN_THE_SAME, Failure, Restarts


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def failure(text: str = "rank 1 was killed by SIGKILL", step: int | None = 5, **more: object) -> Failure:
    return Failure(text, step, **more)  # type: ignore[arg-type]


def test_the_limit_counts_within_its_window() -> None:
    clock = Clock()
    restarts = Restarts(RestartsConfig(limit=2, window_minutes=10), clock)
    for number in (1, 2):
        assert restarts.refusal(failure(step=number)) is None
        assert restarts.count() == f"restart {number} of 2"
    clock.s += 599
    assert restarts.refusal(failure(step=3)) == "not restarted: the limit of 2 restarts within 10m 00s is reached"
    clock.s += 2
    assert restarts.refusal(failure(step=4)) is None
    assert restarts.count() == "restart 1 of 2" and restarts.total == 3


def test_without_restarts_there_is_nothing_to_explain() -> None:
    assert Restarts(RestartsConfig(limit=0)).refusal(failure(fatal=True), stop_asked=True) == ""


@pytest.mark.parametrize(
    ("broken", "circumstances", "why"),
    [
        (failure(), {"stop_asked": True}, "not restarted, because a stop was requested"),
        (failure(), {"stuck": 2}, "not restarted, because 2 of its processes can't be killed"),
        (failure(fatal=True), {}, AGAIN_THE_SAME),
        (failure(exit_code=2, raised=True), {}, AGAIN_THE_SAME),
        (failure(repeats=True), {}, AGAIN_THE_SAME),
        (failure(step=None, raised=True), {}, f"no step was finished before it, so {AGAIN_THE_SAME}"),
        (
            failure(step=None, scripts_own=True),
            {},
            "not restarted, because the script never called runtime.initialize()",
        ),
        (failure(step=None, by_signal=True), {}, None),
        (failure(step=7, raised=True), {}, None),
    ],
)
def test_what_is_tried_again(broken: Failure, circumstances: dict[str, object], why: str | None) -> None:
    assert Restarts(RestartsConfig()).refusal(broken, **circumstances) == why  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (failure(), failure(), True),
        (failure(), failure(step=6), False),
        (failure(), failure("rank 0 was killed by SIGKILL"), False),
        (failure(step=None, by_signal=True), failure(step=None, by_signal=True), False),
        (failure("rank 1 hangs", hung=True), failure("rank 1 hangs", hung=True), True),
        (failure("all ranks are in offload", hung=True), failure("all ranks are in offload", hung=True), False),
        (failure("no block 0x7f12 of 3.5 GiB, pid 41"), failure("no block 0x9a of 12 GiB, pid 7"), True),
        (failure("its error", rank=0), failure("its error", rank=1), False),
        (failure("no rank 7", rank=0, raised=True), failure("no rank 7", rank=1, raised=True), True),
    ],
)
def test_the_same_failure_twice_in_a_row_is_no_chance(first: Failure, second: Failure, same: bool) -> None:
    restarts = Restarts(RestartsConfig())
    assert restarts.refusal(first) is None
    refusal = restarts.refusal(second)
    assert (refusal == f"the same failure at the same step twice in a row: {AGAIN_THE_SAME}") is same
    assert (refusal is None) is not same


def judged(tmp_path: Path, **evidence: object) -> Failure:
    seen = FailureEvidence(2, 1, tmp_path, spoke=True, start_step=20, **evidence)  # type: ignore[arg-type]
    return Failure.of(decide(seen), seen)


def test_a_failure_is_read_from_the_evidence(tmp_path: Path) -> None:
    word = Goodbye(rank=1, outcome="failed", step=20, error="ValueError: no", fatal=True, wall_s=1)
    raised = judged(tmp_path, goodbyes={1: word}, exit_codes={1: 1}, steps={0: 21})
    assert (raised.step, raised.raised, raised.fatal, raised.by_signal) == (None, True, True, False)
    killed = judged(tmp_path, exit_codes={1: -9}, steps={0: 24, 1: 23})
    assert (killed.step, killed.raised, killed.by_signal) == (24, False, True)
    before_a_step = judged(tmp_path, exit_codes={1: -9})
    assert (before_a_step.step, before_a_step.by_signal) == (None, True)
    hung = judged(tmp_path, failure="no progress for 60 s", steps={0: 24, 1: 24}, exit_codes={0: -15})
    assert (hung.text, hung.step, hung.raised) == ("no progress for 60 s", 24, False)


def test_a_launcher_that_can_not_even_start_ranks_is_not_tried_again(tmp_path: Path) -> None:
    seen = FailureEvidence(2, 1, tmp_path)
    assert Failure.of(decide(seen), seen).raised
    killed = FailureEvidence(2, -9, tmp_path)
    assert not Failure.of(decide(killed), killed).raised
