"""Knobs: the settings that `zerotop set` may change while a run trains, with their bounds.

Torch-free. The screen and the command line check a value here before sending it; the ranks check it again before they
apply it; `runtime.config` uses the same bounds for the keys that give a knob its first value.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

KnobValue = int | float | str


class KnobError(ValueError):
    """An unknown knob, or a value that it does not allow. The message names the allowed range or the nearest name."""


@dataclass(frozen=True)
class Knob:
    """One setting that can change during a run."""

    name: str
    """Name in `set NAME=VALUE`."""
    type: type[int] | type[float] | type[str]
    """Type of its values."""
    description: str
    """One line for help texts."""
    unit: str
    """Unit of its values; empty without one."""
    key: str | None
    """The config key that holds the first value, or None when there is none."""
    min: float | None = None
    """Smallest allowed value, inclusive; None if `choices` apply."""
    max: float | None = None
    """Largest allowed value, inclusive; None if `choices` apply."""
    choices: tuple[str, ...] = ()
    """The allowed strings; empty for numbers."""

    @property
    def allowed(self) -> str:
        """The allowed values in words, for messages and help."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = "a whole number" if self.type is int else "a number"
        return f"{kind} from {_short(self.min)} to {_short(self.max)}"

    def check(self, value: Any) -> KnobValue:
        """Return `value` in the knob's own type; raises KnobError when it has the wrong type or is out of bounds."""
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
            raise self._refusal(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refusal(value)
        if not math.isfinite(value) or (self.type is int and value != int(value)):
            raise self._refusal(value)
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise self._refusal(value)
        return self.type(value)

    def _refusal(self, value: Any) -> KnobError:
        shown = value if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        near = difflib.get_close_matches(str(value).lower(), self.choices, n=1)
        hint = f". Did you mean {near[0]}?" if near else ""
        return KnobError(f"{self.name}: expected {self.allowed}, got {shown or 'nothing'}{hint}")


def _short(bound: float | None) -> str:
    return "any" if bound is None else f"{bound:g}" if bound != int(bound) else str(int(bound))


KNOBS: Mapping[str, Knob] = MappingProxyType(
    {
        knob.name: knob
        for knob in (
            Knob(
                name="log_level",
                type=str,
                description="lowest level of log records that ranks send and write",
                unit="",
                key="zerotop.log.level",
                choices=("debug", "info", "warning", "error"),
            ),
            Knob(
                name="log_interval",
                type=int,
                description="optimizer steps between two progress lines",
                unit="steps",
                key="zerotop.log.interval",
                min=1,
                max=1_000_000,
            ),
            Knob(
                name="telemetry_hz",
                type=float,
                description="messages per second that each rank sends at most",
                unit="Hz",
                key="zerotop.telemetry.hz",
                min=0.5,
                max=50.0,
            ),
            Knob(
                name="checkpoint_interval",
                type=int,
                description="optimizer steps between two automatic checkpoints; 0 makes none",
                unit="steps",
                key="zerotop.checkpoint.interval",
                min=0,
                max=1_000_000_000,
            ),
            Knob(
                name="checkpoint_minutes",
                type=float,
                description="minutes between two automatic checkpoints, besides the interval in steps; 0 makes none",
                unit="minutes",
                key="zerotop.checkpoint.minutes",
                min=0.0,
                max=1_000_000.0,
            ),
            Knob(
                name="checkpoints_kept",
                type=int,
                description="newest complete checkpoints that stay on disk",
                unit="checkpoints",
                key="zerotop.checkpoint.keep",
                min=1,
                max=1000,
            ),
            Knob(
                name="lr_factor",
                type=float,
                description="factor on the learning rate that the scheduler gives; saved in checkpoints",
                unit="",
                key=None,
                min=0.0,
                max=100.0,
            ),
        )
    }
)


def get_knob(name: str) -> Knob:
    """The knob called `name`; raises KnobError with the nearest name, or all names, when there is none."""
    knob = KNOBS.get(name)
    if knob is not None:
        return knob
    by_key = {knob.key: knob.name for knob in KNOBS.values() if knob.key}
    tail = {key.rsplit(".", 1)[1]: knob_name for key, knob_name in by_key.items()}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), KNOBS, n=1, cutoff=0.5)
    starts = [knob_name for knob_name in KNOBS if len(name) > 1 and knob_name.startswith(name.lower())]
    guess = by_key.get(name) or next(iter([*near, *starts]), None) or tail.get(name)
    hint = f"Did you mean {guess}? " if guess else ""
    raise KnobError(f"{name or 'the empty name'} is not a setting. {hint}Settings: {', '.join(KNOBS)}")


def parse_knob(name: str, text: str) -> KnobValue:
    """The value that `text` (as typed after `set name=`) gives the knob; raises KnobError when it is not allowed."""
    knob = get_knob(name)
    text = text.strip()
    if knob.choices:
        return knob.check(text.lower())
    try:
        number = float(text)
    except ValueError:
        raise knob._refusal(text) from None
    if not math.isfinite(number):
        raise knob._refusal(text)
    # Bounds are far below 2**53, so a float holds every allowed whole number exactly.
    return knob.check(int(number) if number.is_integer() and abs(number) < 2**53 else number)
