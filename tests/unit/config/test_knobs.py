"""What `zerotop set` takes: values with bounds, unknown names with a suggestion."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.config import ConfigError, load
from runtime.config.knobs import KNOBS, KnobError, get_knob, parse_knob


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("log_level", "DEBUG", "debug"),
        ("log_interval", "1", 1),
        ("log_interval", " 20 ", 20),
        ("log_interval", "1e3", 1000),
        ("telemetry_hz", "2.5", 2.5),
        ("telemetry_hz", "50", 50.0),
        ("checkpoint_interval", "0", 0),
        ("checkpoints_kept", "3", 3),
        ("lr_factor", "0.1", 0.1),
        ("lr_factor", "0", 0.0),
    ],
)
def test_values(name: str, text: str, value: Any) -> None:
    parsed = parse_knob(name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "log_level",
            "warn",
            "log_level: expected one of debug, info, warning, error, got warn. Did you mean warning?",
        ),
        ("log_interval", "0", "log_interval: expected a whole number from 1 to 1000000, got 0"),
        ("log_interval", "1.5", "log_interval: expected a whole number from 1 to 1000000, got 1.5"),
        ("log_interval", "", "log_interval: expected a whole number from 1 to 1000000, got nothing"),
        ("telemetry_hz", "51", "telemetry_hz: expected a number from 0.5 to 50, got 51"),
        ("telemetry_hz", "nan", "telemetry_hz: expected a number from 0.5 to 50, got nan"),
        ("lr_factor", "-1", "lr_factor: expected a number from 0 to 100, got -1"),
        ("lr_factor", "inf", "lr_factor: expected a number from 0 to 100, got inf"),
        ("checkpoints_kept", "9" * 400, "checkpoints_kept: expected a whole number from 1 to 1000, got 9999"),
        ("checkpoints_kept", "9" * 5000, "checkpoints_kept: expected a whole number from 1 to 1000, got 9999"),
    ],
)
def test_refused_values_name_the_range(name: str, text: str, message: str) -> None:
    with pytest.raises(KnobError) as caught:
        parse_knob(name, text)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("log_intervall", "log_interval"),
        ("log-interval", "log_interval"),
        ("zerotop.telemetry.hz", "telemetry_hz"),
        ("lr", "lr_factor"),
        ("keep", "checkpoints_kept"),
    ],
)
def test_unknown_knob_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(KnobError) as caught:
        get_knob(name)
    assert f"{name} is not a setting. Did you mean {meant}? Settings: log_level, " in str(caught.value)


@pytest.mark.parametrize("value", [True, None, "3", [1], float("nan")])
def test_check_takes_no_other_types(value: Any) -> None:
    with pytest.raises(KnobError):
        KNOBS["log_interval"].check(value)


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.key and not knob.choices])
def test_config_key_has_the_same_bounds(name: str) -> None:
    knob = KNOBS[name]
    assert knob.key is not None
    assert knob.min is not None
    assert knob.max is not None
    for good in (knob.min, knob.max):
        load({}, [f"{knob.key}={knob.type(good)}"])
    for bad in (knob.min - 1, knob.max + 1):
        with pytest.raises(ConfigError, match=knob.key):
            load({}, [f"{knob.key}={knob.type(bad)}"])


def test_every_knob_says_what_it_is() -> None:
    assert list(KNOBS) == [
        "log_level", "log_interval", "telemetry_hz", "checkpoint_interval", "checkpoint_minutes",
        "checkpoints_kept", "lr_factor",
    ]  # fmt: skip
    for knob in KNOBS.values():
        assert knob.description
        assert knob.choices or (knob.min is not None and knob.max is not None and knob.min < knob.max)
