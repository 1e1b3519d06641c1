"""The page of results: how many of each file pass, and every test that does not, with its reason."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.deepspeed_tests.applicable import cause_of
from benchmarks.deepspeed_tests.outcomes import Outcome
from benchmarks.deepspeed_tests.reasons import LEFT_OUT


def page(outcomes: list[Outcome], tests: Mapping[str, Sequence[str]], argv: Sequence[str]) -> str:
    """As Markdown. `tests`: the names of all tests of each file. `argv`: the benchmark's own arguments."""
    shown = [
        "CHECKOUT" if Path(word).is_dir() else Path(word).name if Path(word).is_absolute() else word for word in argv
    ]
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.file, Counter())["explained" if outcome.reason else outcome.result] += 1
    for file, names in tests.items():
        found = counts.setdefault(file, Counter())
        found["not run"] = len(names) - found.total()
    counts["**all**"] = sum(counts.values(), Counter())
    lines = [
        "# DeepSpeed's own tests, with `runtime` in the place of `deepspeed`",
        f"`python -m benchmarks.deepspeed_tests {' '.join(shown)}`",
        "",
        f"Python {platform.python_version()}, {platform.machine()}, CPUs and Gloo, {minutes:.0f} min. What "
        "DeepSpeed's tests skip on CPUs by themselves counts as skipped.",
        "",
        "| file | passed | failed, with a reason below | failed otherwise | skipped | not run |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in counts.items():
        numbers = (found[kind] for kind in ("passed", "explained", "failed", "skipped", "not run"))
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    lines += ["", "## Why not", *_by_kind([(outcome.reason, outcome) for outcome in failed if outcome.reason])]
    if unexplained := [(cause_of(outcome.message), outcome) for outcome in failed if not outcome.reason]:
        lines += ["## Without a reason", *_by_kind(unexplained)]
    lines += ["## Files that are not run", "| below tests/unit | why |", "|---|---|"]
    lines += [f"| {', '.join(files)} | {why} |" for why, files in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _by_kind(found: list[tuple[str, Outcome]]) -> list[str]:
    """A heading and a list for each kind, the largest first."""
    lines: list[str] = []
    for kind, number in Counter(kind for kind, _ in found).most_common():
        lines += [f"### {kind} ({number})"]
        for file, names in _named(outcome for one, outcome in found if one == kind).items():
            lines.append(f"- {file}: {', '.join(names)}")
        lines.append("")
    return lines


def _named(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """File -> its tests; those that differ in their parameters alone are one, with their number."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.file, Counter())[outcome.name.partition("[")[0]] += 1
    return {
        file: [f"{name} ({number})" if number > 1 else name for name, number in found.items()]
        for file, found in counts.items()
    }
