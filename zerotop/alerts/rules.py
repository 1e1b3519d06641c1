"""The grammar of rules:

    RULE       CONDITION [for TIME] [until CONDITION]
    CONDITION  METRIC (> | >= | < | <= | == | !=) VALUE | METRIC is [not] nan
               no step for TIME | verdict is [not] WHAT | verdict changes

`for` asks that the condition holds all that time before the alert fires. With `until` a firing alert is over when that
condition holds, and not as soon as the first one no longer does.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import get_args

from runtime.config.errors import clipped, nearest
from runtime.config.outputs import parse_duration
from zerotop.alerts.conditions import Comparison, Condition, NoStep, NotFinite, VerdictChanges, VerdictIs
from zerotop.alerts.metrics import METRICS, Dimension, Metric
from zerotop.verdict.finding import What

EXAMPLES = '"loss > 10 for 30s", "vram > 95%", "no step for 60s", "verdict is straggler", "verdict changes"'
_UNTIL = re.compile(r"\s+until\s+", re.IGNORECASE)
_FOR = re.compile(r"(?P<condition>.+?)\s+for\s+(?P<time>.+)", re.IGNORECASE | re.DOTALL)
_NO_STEP = re.compile(r"no\s+steps?(?:\s+for\s+(?P<time>.+))?", re.IGNORECASE | re.DOTALL)
_VERDICT = re.compile(r"verdict\b\s*(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_IS = re.compile(r"is\s+(?P<negated>not\s+)?(?P<what>.+)", re.IGNORECASE | re.DOTALL)
_NAN = re.compile(r"(?P<metric>.+?)\s+is\s+(?P<negated>not\s+)?(?:nan|finite)", re.IGNORECASE | re.DOTALL)
_COMPARISON = re.compile(r"(?P<metric>.+?)\s*(?P<sign>>=|<=|==|!=|>|<|=)\s*(?P<value>.+)", re.DOTALL)
_VALUE = re.compile(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>[a-z%°/]*)", re.IGNORECASE)
_ALIASES = {
    "learning_rate": "lr",
    "tokens/s": "tokens_per_s",
    "evaluation_loss": "eval_loss",
    "gradient_norm": "grad_norm",
}
_SIZES = {"k": 1, "m": 2, "g": 3, "t": 4}
_UNITS: dict[str, tuple[Dimension, float]] = {
    "%": ("share", 0.01), "w": ("W", 1.0), "kw": ("W", 1e3), "c": ("°C", 1.0), "°c": ("°C", 1.0), "b": ("bytes", 1.0),
    "tokens/s": ("tokens/s", 1.0), "ms": ("seconds", 1e-3), "s": ("seconds", 1.0), "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    **{f"{letter}ib": ("bytes", 1024.0**power) for letter, power in _SIZES.items()},
    **{f"{letter}b": ("bytes", 1000.0**power) for letter, power in _SIZES.items()},
}  # fmt: skip
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
"""Units of a value without a dimension of its own. (`m` is a million, and of a time a minute.)"""
_EXAMPLE_VALUES: dict[Dimension, str] = {
    "number": "10", "count": "10", "bytes": "70GiB", "share": "95%", "seconds": "30s", "tokens/s": "10K", "W": "300W",
    "°C": "85C",
}  # fmt: skip


class RuleError(ValueError):
    """A rule that can't be understood: what was expected, what came, and what there is."""


@dataclass(frozen=True)
class Rule:
    """`for_s`: seconds for which `condition` must hold before the alert fires."""

    text: str
    condition: Condition
    for_s: float = 0.0
    until: Condition | None = None

    @property
    def needs_gpu(self) -> bool:
        """Whether it can hold only on a GPU."""
        return isinstance(self.condition, Comparison | NotFinite) and self.condition.metric.needs_gpu


def parse_rule(text: str) -> Rule:
    """The rule that `text` says. Raises RuleError."""
    first, *others = _UNTIL.split(" ".join(text.split()))
    if len(others) > 1:
        raise RuleError('expected at most one "until"')
    until = _condition(others[0]) if others else None
    if _NO_STEP.fullmatch(first):
        return Rule(text, _condition(first), until=until)
    match = _FOR.fullmatch(first)
    if match is None:
        return Rule(text, _condition(first), until=until)
    return Rule(text, _condition(match["condition"]), _time(match["time"]), until)


def _condition(text: str) -> Condition:
    text = text.strip()
    if match := _NO_STEP.fullmatch(text):
        if match["time"] is None:
            raise RuleError('expected a time after "no step", such as "no step for 60s"')
        return NoStep(_time(match["time"]))
    if match := _VERDICT.fullmatch(text):
        return _verdict(match["rest"].strip())
    if match := _NAN.fullmatch(text):
        if match["negated"]:
            raise RuleError(f'expected "{match["metric"]} is nan", got {clipped(text)!r}')
        metric = _metric(match["metric"])
        return NotFinite(metric, next(iter(metric.readers)))
    match = _COMPARISON.fullmatch(text)
    if match is None:
        _metric(text.split()[0] if text else "")  # a wrong name is the better message
        raise RuleError(f"expected a condition such as {EXAMPLES}, got {clipped(text)!r}")
    metric = _metric(match["metric"])
    dimension, threshold = _value(match["value"], metric)
    return Comparison(metric, dimension, "==" if match["sign"] == "=" else match["sign"], threshold)


def _time(text: str) -> float:
    seconds = parse_duration(text)
    if seconds is None or seconds <= 0:
        raise RuleError(f'expected a time such as "30s", "10m" or "1h" after "for", got {clipped(text)!r}')
    return seconds


def _verdict(rest: str) -> Condition:
    if rest.lower() in ("changes", "changed"):
        return VerdictChanges()
    names = get_args(What)
    match = _IS.fullmatch(rest)
    if match is None:
        raise RuleError(f'expected "verdict changes", "verdict is WHAT" or "verdict is not WHAT", got "verdict {rest}"')
    what = match["what"].strip().strip("\"'")
    known = {name.lower(): name for name in names}
    if what.lower() not in known:
        near = _near(what, names)
        raise RuleError(f"unknown verdict {clipped(what)}.{near} Known: {', '.join(names)}")
    return VerdictIs(known[what.lower()], bool(match["negated"]))


def _metric(text: str) -> Metric:
    name = text.strip().lower().replace("-", "_").replace(" ", "_")
    metric = METRICS.get(_ALIASES.get(name, name))
    if metric is None:
        near = _near(name, [*METRICS, *_ALIASES])
        raise RuleError(f"unknown metric {clipped(text.strip()) or '(none)'}.{near} Known: {', '.join(METRICS)}")
    return metric


def _near(word: str, words: list[str] | tuple[str, ...]) -> str:
    near = nearest(word, words)
    return f" Did you mean {near}?" if near else ""


def _value(text: str, metric: Metric) -> tuple[Dimension, float]:
    """(dimension, value in its base unit)."""
    match = _VALUE.fullmatch(text.strip())
    examples = " or ".join(f"{metric.name} > {_EXAMPLE_VALUES[dimension]}" for dimension in metric.readers)
    wrong = RuleError(f"expected a value such as in {examples}, got {clipped(text.strip())!r}")
    if match is None:
        raise wrong
    number, unit = float(match["number"]), match["unit"].lower()
    if not math.isfinite(number):
        raise wrong
    if unit == "m" and "seconds" in metric.readers:
        return "seconds", number * 60
    if unit in _UNITS:
        dimension, factor = _UNITS[unit]
        if dimension not in metric.readers:
            raise wrong
        return dimension, number * factor
    for dimension in ("number", "count", "tokens/s", "W", "°C"):
        if unit in _FACTORS and dimension in metric.readers:
            return dimension, number * _FACTORS[unit]
    raise wrong
