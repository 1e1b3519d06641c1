"""The grammar of rules: what each sentence means, and what is said about one that means nothing."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from runtime.wire.judgement import Verdict
from tests.harness.fakehub import hello, step_result
from tests.unit.state.test_gpu import a_run, gpu
from zerotop.alerts.conditions import Comparison, Moment, NoStep, NotFinite, VerdictChanges, VerdictIs
from zerotop.alerts.metrics import METRICS
from zerotop.alerts.rules import RuleError, parse_rule
from zerotop.state.run import RunState
from zerotop.verdict.finding import What


def found(rule: str, state: RunState, **moment: float | None) -> str | None:
    match = parse_rule(rule).condition.look(Moment(state, **moment))  # type: ignore[arg-type]
    return match.text if match is not None else None


@pytest.mark.parametrize(
    ("rule", "name", "dimension", "sign", "threshold"),
    [
        ("loss > 10", "loss", "number", ">", 10.0),
        ("  LOSS   >=1e-3 ", "loss", "number", ">=", 1e-3),
        ("learning-rate < .5", "lr", "number", "<", 0.5),
        ("vram > 95%", "vram", "share", ">", 0.95),
        ("vram > 70 GiB", "vram", "bytes", ">", 70.0 * 2**30),
        ("rss > 1.5GB", "rss", "bytes", ">", 1.5e9),
        ("step_time > 2m", "step_time", "seconds", ">", 120.0),
        ("wait > 250ms", "wait", "seconds", ">", 0.25),
        ("wait > 30%", "wait", "share", ">", 0.3),
        ("tokens_per_s < 12.5K", "tokens_per_s", "tokens/s", "<", 12_500.0),
        ("tokens_per_s < 9000 tokens/s", "tokens_per_s", "tokens/s", "<", 9000.0),
        ("gpu_temperature >= 85", "gpu_temperature", "°C", ">=", 85.0),
        ("gpu_temperature >= 85°C", "gpu_temperature", "°C", ">=", 85.0),
        ("gpu_power > 0.7kW", "gpu_power", "W", ">", 700.0),
        ("restarts != 0", "restarts", "count", "!=", 0.0),
        ("step = 1000", "step", "count", "==", 1000.0),
    ],
)
def test_a_comparison(rule: str, name: str, dimension: str, sign: str, threshold: float) -> None:
    condition = parse_rule(rule).condition
    assert isinstance(condition, Comparison)
    assert (condition.metric.name, condition.dimension, condition.sign) == (name, dimension, sign)
    assert condition.threshold == pytest.approx(threshold)


def test_for_and_until_belong_to_the_rule() -> None:
    rule = parse_rule("loss > 10 for 1.5m until loss < 8")
    assert rule.for_s == 90.0
    assert isinstance(rule.until, Comparison) and rule.until.threshold == 8.0
    still = parse_rule("no step for 5m until step > 10")
    assert still.condition == NoStep(300.0) and still.for_s == 0.0 and still.until is not None


def test_the_other_conditions() -> None:
    assert parse_rule("verdict changes").condition == VerdictChanges()
    assert parse_rule("verdict is Hang in Transfer").condition == VerdictIs("hang in transfer")
    assert parse_rule("verdict is not healthy for 1m").condition == VerdictIs("healthy", negated=True)
    assert isinstance(parse_rule("grad_norm is nan").condition, NotFinite)
    assert all(parse_rule(f"verdict is {what}").condition == VerdictIs(what) for what in get_args(What))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("los > 10", ["unknown metric los", "Did you mean loss?", "Known: loss, eval_loss, lr"]),
        ("temperature > 3", ["unknown metric temperature", "gpu_temperature"]),
        ("loss", ["expected a condition such as", '"loss > 10 for 30s"']),
        ("loss > ten", ["expected a value such as in loss > 10", "'ten'"]),
        ("loss > 5GiB", ["expected a value such as in loss > 10", "'5GiB'"]),
        ("loss > 1e999", ["expected a value"]),
        ("vram > 95", ["vram > 95% or vram > 70GiB", "'95'"]),
        ("loss > 10 for ever", ['"30s", "10m" or "1h" after "for"', "'ever'"]),
        ("no step", ["no step for 60s"]),
        ("no step for 0s", ['"30s"']),
        ("verdict is hung", ["unknown verdict hung", "Did you mean hang?", "straggler"]),
        ("verdict", ["verdict changes", "verdict is WHAT"]),
        ("loss is not nan", ["loss is nan"]),
        ("loss > 1 until loss < 2 until loss < 3", ["at most one"]),
        (" ", ["unknown metric (none)"]),
    ],
)
def test_what_is_said_about_a_wrong_rule(rule: str, says: list[str]) -> None:
    with pytest.raises(RuleError) as raised:
        parse_rule(rule)
    assert [words for words in says if words not in str(raised.value)] == []


def test_the_text_has_the_figures_and_the_ranks() -> None:
    run = a_run(
        gpu(0, used_bytes=90 * 2**30, total_bytes=100 * 2**30), gpu(1, used_bytes=97 * 2**30, total_bytes=100 * 2**30)
    )
    assert found("vram > 95%", run) == "vram 97% on rank 1"
    assert found("vram > 80GiB", run) == "vram 97.0 GiB on rank 1 and 1 other"
    assert found("vram < 95%", run) == "vram 90% on rank 0"
    assert found("vram > 98%", run) is None
    match = parse_rule("vram > 80%").condition.look(Moment(run))
    assert match is not None and match.ranks == (0, 1) and match.value == pytest.approx(0.97)


def test_a_figure_that_is_not_known_or_not_a_number_never_holds() -> None:
    run = RunState()
    assert all(found(f"{name} > {value}", run) is None for name, value in (("loss", 0), ("vram", "0%"), ("mfu", "0%")))
    run.apply(hello())
    run.apply(step_result(loss=math.nan))
    assert found("loss > 10", run) is None and found("loss < 10", run) is None and found("loss != 10", run) is None
    assert found("loss is nan", run) == "loss NaN"
    run.apply(step_result(step=2, loss=math.inf))
    assert found("loss > 10", run) == "loss +inf" and found("loss is nan", run) == "loss +inf"
    run.apply(step_result(step=3, loss=3.0))
    assert found("loss is nan", run) is None


def test_verdict_is() -> None:
    run = RunState()
    assert found("verdict is not healthy", run) is None
    run.apply(Verdict(what="straggler", severity="warning", ranks=[3], text="rank 3 is slow"))
    assert found("verdict is straggler", run) == found("verdict is not healthy", run) == "rank 3 is slow"
    assert found("verdict is hang", run) is None


def test_every_metric_is_described_and_reads_an_empty_run() -> None:
    for metric in METRICS.values():
        assert metric.description and metric.readers
        assert all(list(reader(RunState())) in ([], [*reader(RunState())]) for reader in metric.readers.values())
