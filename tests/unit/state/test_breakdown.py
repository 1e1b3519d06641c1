"""Where the time of a step went: the parts sum to the step, and waiting is told from transfer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.wire.messages import StepResult
from zerotop.state.breakdown import PARTS, RECENT_STEPS, TYPICAL_STEPS, Breakdowns, breakdown_of

PHASES = ["data", "forward", "backward", "reduce", "gather", "step", "offload", "checkpoint", "eval", "paused", "idle"]


def result(step: int, phase_ms: dict[str, float], wait_ms: dict[str, float], rank: int = 0) -> StepResult:
    return StepResult(
        rank=rank,
        step=step,
        loss=1.0,
        lr=1e-3,
        grad_norm=1.0,
        step_ms=sum(phase_ms.values()),
        phase_ms=phase_ms,
        phase_wait_ms=wait_ms,
        end_ns=0,
    )


@given(
    st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1e6)),
    st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1e6)),
    st.floats(0, 1e7),
)
def test_the_parts_sum_to_the_step(phases: dict[str, float], waits: dict[str, float], waited: float) -> None:
    message = result(1, phases, waits)
    assert breakdown_of(message).step_ms == pytest.approx(message.step_ms)
    if phases:
        kept = Breakdowns()
        kept.add(message)
        mean = kept.recent({0: waited})[0]
        assert mean.step_ms == pytest.approx(message.step_ms)
        assert all(getattr(mean, part) >= 0 for part in PARTS)


def test_blocked_time_is_waiting_up_to_what_the_rank_waited_for_peers() -> None:
    kept = Breakdowns()
    for step in range(1, 4):
        kept.add(result(step, {"forward": 100.0, "reduce": 50.0, "gather": 20.0}, {"reduce": 40.0, "gather": 10.0}))
    whole = kept.recent({})[0]
    assert (whole.waiting, whole.transfer, whole.compute) == (50.0, 20.0, 100.0)
    split = kept.recent({0: 30.0})[0]
    assert (split.waiting, split.transfer, split.compute) == (30.0, 40.0, 100.0)
    assert kept.recent({0: 90.0})[0].waiting == 50.0  # overlapped waiting costs the step nothing


def test_a_rank_is_compared_with_its_own_past() -> None:
    kept = Breakdowns()
    for step in range(1, 31):
        kept.add(result(step, {"forward": 100.0}, {}))
    assert kept.usual_ms(0, "compute") is None  # too little past
    for step in range(31, 31 + RECENT_STEPS):
        kept.add(result(step, {"forward": 300.0}, {}))
    assert kept.usual_ms(0, "compute") == 100.0
    assert kept.recent({})[0].compute == 300.0


def test_a_lasting_share_is_seen_after_a_few_steps_and_a_single_pause_is_none() -> None:
    kept = Breakdowns()
    assert kept.lasting_share(0, "data") == 0.0

    def take(steps: int, data_ms: float) -> float:
        for _ in range(steps):
            kept.add(result(1, {"forward": 100.0, "data": data_ms}, {}))
        return kept.lasting_share(0, "data")

    assert take(RECENT_STEPS, 0.0) == 0.0
    assert take(1, 10_000.0) == 0.0
    assert take(RECENT_STEPS, 0.0) == 0.0
    assert take(TYPICAL_STEPS // 2 + 1, 100.0) == 0.5


def test_data_that_is_late_in_every_tenth_step_has_a_lasting_share() -> None:
    kept = Breakdowns()
    for step in range(1, RECENT_STEPS + 1):
        kept.add(result(step, {"forward": 100.0, "data": 0.0 if step % 10 else 1_900.0}, {}))
    assert kept.lasting_share(0, "data") == pytest.approx(0.5)
