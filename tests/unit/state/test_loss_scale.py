"""Loss scaling: trajectories written out by hand, and against a reference on random sequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import Fp16Config, load
from runtime.state.loss_scale import DynamicScaler, FixedScaler, ScaleExhausted, scaler_for

X, G = True, False  # overflow, good


def trajectory(outcomes: list[bool], **settings: object) -> list[float]:
    scaler = DynamicScaler(Fp16Config(**settings))  # type: ignore[arg-type]
    scales = []
    for overflow in outcomes:
        scaler.update(overflow)
        scales.append(scaler.scale)
    return scales


@pytest.mark.parametrize(
    ("settings", "outcomes", "expected"),
    [
        # halves at each overflow without hysteresis
        ({"initial_scale_power": 4, "hysteresis": 1}, [X, X, G], [8, 4, 4]),
        # the first overflow is tolerated
        ({"initial_scale_power": 4, "hysteresis": 2}, [X, X, X], [16, 8, 4]),
        # doubles after a window without overflow; counted from the overflow
        ({"initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}, [X, G, G, G, G], [8, 8, 16, 16, 32]),
        # the window refills the hysteresis
        (
            {"initial_scale_power": 4, "hysteresis": 2, "loss_scale_window": 2},
            [X, G, G, X, X],
            [16, 16, 32, 32, 16],
        ),
        # consecutive_hysteresis: any good step refills it
        (
            {"initial_scale_power": 4, "hysteresis": 2, "consecutive_hysteresis": True},
            [X, G, X, G, X, X],
            [16, 16, 16, 16, 16, 8],
        ),
        # never below the minimum
        ({"initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 2.0}, [X, G], [2, 2]),
    ],
)
def test_trajectories(settings, outcomes, expected):
    assert trajectory(outcomes, **settings) == expected


def test_an_overflow_at_the_smallest_scale_is_an_error():
    with pytest.raises(ScaleExhausted, match=r"smallest loss scale \(1, fp16.min_loss_scale\)"):
        trajectory([X] * 6, initial_scale_power=4, hysteresis=1)


def reference(outcomes: list[bool], power: int, window: int, hysteresis: int, consecutive: bool) -> list[float]:
    """The same as a table of events: since when no overflow, how many are left to tolerate."""
    scale, left, good, scales = 2.0**power, hysteresis, 0, []
    for overflow in outcomes:
        if overflow:
            good = 0
            if left <= 1:
                scale = max(scale / 2, 2.0**-300)
            else:
                left -= 1
        else:
            good += 1
            if consecutive:
                left = hysteresis
            if good % window == 0:
                left = hysteresis
                scale *= 2
        scales.append(scale)
    return scales


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 16), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_random_sequences_follow_the_reference(outcomes, power, window, hysteresis, consecutive):
    found = trajectory(
        outcomes,
        initial_scale_power=power,
        loss_scale_window=window,
        hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
        min_loss_scale=2.0**-300,
    )
    assert found == reference(outcomes, power, window, hysteresis, consecutive)


@given(st.lists(st.booleans(), max_size=30), st.lists(st.booleans(), max_size=30))
def test_a_loaded_state_goes_on_as_the_old_one(before, after):
    config = Fp16Config(loss_scale_window=3, min_loss_scale=2.0**-300)
    one, other = DynamicScaler(config), DynamicScaler(config)
    for overflow in before:
        one.update(overflow)
    other.load_state_dict(one.state_dict())
    for overflow in after:
        one.update(overflow)
        other.update(overflow)
        assert one.scale == other.scale


def test_what_a_config_gets():
    base = {"train_batch_size": 1}
    assert scaler_for(load(base).resolve(1, "cpu")).scale == 1.0
    dynamic = scaler_for(load({**base, "fp16": {"enabled": True, "initial_scale_power": 8}}).resolve(1, "cuda"))
    assert isinstance(dynamic, DynamicScaler) and dynamic.scale == 256
    fixed = scaler_for(load({**base, "fp16": {"enabled": True, "loss_scale": 128}}).resolve(1, "cuda"))
    fixed.update(overflow=True)
    assert isinstance(fixed, FixedScaler) and fixed.scale == 128
