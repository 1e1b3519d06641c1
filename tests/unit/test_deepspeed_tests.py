"""The benchmark that runs DeepSpeed's own tests: what it remembers, chooses and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.deepspeed_tests.applicable import FILES
from benchmarks.deepspeed_tests.execution import Choice
from benchmarks.deepspeed_tests.outcomes import Outcome, Outcomes
from benchmarks.deepspeed_tests.reasons import REASONS, reason_of, unjudged
from benchmarks.deepspeed_tests.table import page

FILE = "runtime/test_no_sync_ctxt.py"


def test_outcomes_are_kept_and_the_last_of_a_test_counts(tmp_path: Path) -> None:
    kept = Outcomes(tmp_path / "tests.jsonl")
    kept.add_names(FILE, ["a", "b"])
    for result in ("failed", "passed"):
        kept.add(Outcome(FILE, "a", result, 1.5, "message"))
    again = Outcomes(tmp_path / "tests.jsonl")
    assert again.names == {FILE: ["a", "b"]} and [one.result for one in again.of(FILE)] == ["passed"]
    assert again.of("other.py") == [] and again.in_order(["other.py", FILE]) == again.of(FILE)


def test_a_sample_is_spread_evenly() -> None:
    names = [f"test[{number}]" for number in range(10)]
    assert Choice(sample=3).of(names) == ["test[0]", "test[3]", "test[6]"]
    assert Choice(only="[7]").of(names) == ["test[7]"] and Choice(sample=99).of(names) == names


def test_of_each_function_so_many_cases_are_chosen() -> None:
    names = ["A::one[0]", "A::one[1]", "A::one[2]", "A::one[3]", "A::two[0]", "plain"]
    assert Choice(cases=1).of(names) == ["A::one[0]", "A::two[0]", "plain"]
    assert Choice(cases=2).of(names) == ["A::one[0]", "A::one[2]", "A::two[0]", "plain"]
    assert Choice(cases=9).of(names) == names and Choice(sample=1, cases=1).of(names) == ["A::one[0]"]


def test_what_the_message_says_comes_before_the_name() -> None:
    name = "TestNoSyncCtxt::test_zero_stage[2-dtype1]"
    assert reason_of(FILE, name, "E  Failed: DID NOT RAISE") == "works here, and DeepSpeed refuses it"
    assert reason_of(FILE, name, "E  ConfigError: fp16.enabled: fp16 needs a GPU") == "fp16 needs a GPU"
    assert reason_of(FILE, "TestOther::test", "E  AssertionError") == ""


def test_every_reason_is_for_a_file_that_runs() -> None:
    assert {file for tests in REASONS.values() for file, _ in tests} <= set(FILES)
    assert unjudged(["v1/moe/test_x.py", "unknown/test_y.py"]) == ["unknown/test_y.py"]


@pytest.mark.parametrize("reason", ["", "fp16 needs a GPU"])
def test_the_page_names_every_failure(reason: str) -> None:
    outcomes = [
        Outcome(FILE, "A::passes", "passed"),
        *(Outcome(FILE, f"A::fails[{n}]", "failed", 1, reason) for n in (1, 2)),
    ]
    text = page(
        outcomes, {FILE: ["A::passes", "A::fails[1]", "A::fails[2]", "A::later"]}, ["--results", "/tmp/x/tests.jsonl"]
    )
    numbers = "1 | 2 | 0 | 0 | 1" if reason else "1 | 0 | 2 | 0 | 1"
    assert f"| {FILE} | {numbers} |" in text and f"| **all** | {numbers} |" in text
    assert f"- {FILE}: A::fails (2)" in text and "/tmp" not in text
    assert ("### fp16 needs a GPU (2)" in text) == bool(reason) != ("## Without a reason" in text)
