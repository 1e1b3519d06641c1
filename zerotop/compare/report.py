"""A comparison as a document and as text."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from zerotop.compare.curves import AXES, Axis, RunCurves
from zerotop.compare.verdicts import Judgement, Verdict, common_steps, judge, overall
from zerotop.format import MISSING, bytes_text, count_text, duration_text, figure_text, ms_text, rate_text
from zerotop.launch.differences import Difference, differences, value_text
from zerotop.output import table
from zerotop.rundir.directory import RunEntry

ROWS = 8
"""Places on an axis at which the losses of both runs are given."""
HIDDEN_KEYS = frozenset({"notes"})
"""Keys of a resolved config that say nothing about a run."""


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other. `gate`: the figures that the overall judgement is about."""

    a: RunCurves
    b: RunCurves
    verdicts: dict[str, Verdict]
    config: list[Difference]
    gate: tuple[str, ...]

    @property
    def judgement(self) -> Judgement:
        """Of all figures of the gate."""
        return overall([self.verdicts[name] for name in self.gate])


def compare_runs(
    a: RunCurves,
    b: RunCurves,
    config: list[Difference],
    gate: tuple[str, ...],
    tolerances: dict[str, float] | None = None,
) -> Comparison:
    """Judge B beside A."""
    return Comparison(a, b, judge(a, b, tolerances), config, gate)


def config_difference(a: RunEntry, b: RunEntry) -> list[Difference]:
    """How the resolved configs differ; none if one of them cannot be read."""
    try:
        old, new = (json.loads((entry.path / "resolved.json").read_bytes()) for entry in (a, b))
    except (OSError, ValueError):
        return []
    return [one for one in differences(old, new) if one[0].partition(".")[0] not in HIDDEN_KEYS]


def loss_at(run: RunCurves, axis: Axis, place: float) -> float | None:
    """The loss of the last step up to a place on an axis, smoothed over the steps around it; None before the first
    step and beyond the last."""
    places = [point.at(axis) for point in run.points]
    if not places or any(one is None for one in places):
        return None
    known = [one for one in places if one is not None]
    at = bisect_right(known, place)
    if at == 0 or place > known[-1]:
        return None
    near = [point.loss for point in run.points[max(0, at - 5) : at] if point.loss is not None]
    return sum(near) / len(near) if near else None


def loss_table(a: RunCurves, b: RunCurves, axis: Axis) -> list[tuple[float, float | None, float | None]]:
    """(place, loss of A, loss of B) at ROWS places that both runs have reached."""
    ends = [run.points[-1].at(axis) if run.points else None for run in (a, b)]
    begins = [run.points[0].at(axis) if run.points else None for run in (a, b)]
    if None in ends or None in begins:
        return []
    begin, end = max(one or 0.0 for one in begins), min(one or 0.0 for one in ends)
    if end <= begin:
        return []
    places = [begin + (end - begin) * (number + 1) / ROWS for number in range(ROWS)]
    if axis == "step":
        places = sorted({float(round(place)) for place in places})
    return [(place, loss_at(a, axis, place), loss_at(b, axis, place)) for place in places]


# ---- documents -------------------------------------------------------------------------------------------------------
def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The output of `compare --json`."""
    a, b = comparison.a, comparison.b
    return {
        "a": _run_document(a),
        "b": _run_document(b),
        "verdict": comparison.judgement,
        "gate": list(comparison.gate),
        "figures": {name: verdict.document() for name, verdict in comparison.verdicts.items()},
        "common_steps": len(common_steps(a, b)),
        "loss": {
            axis: [{axis: place, "a": of_a, "b": of_b} for place, of_a, of_b in loss_table(a, b, axis)] for axis in AXES
        },
        "evaluations": [
            {"step": step, "a": loss, "b": b.evaluations[step]}
            for step, loss in sorted(a.evaluations.items())
            if step in b.evaluations
        ],
        "config": [{"key": key, "a": old, "b": new} for key, old, new in comparison.config],
    }


def _run_document(run: RunCurves) -> dict[str, Any]:
    newest = run.points[-1] if run.points else None
    return {
        "name": run.name,
        "state": run.state,
        "step": newest.step if newest else None,
        "loss": newest.loss if newest else None,
        "tokens": newest.tokens if newest else None,
        "time_s": newest.time_s if newest else None,
        "tokens_per_s": newest.tokens_per_s if newest else None,
        "peak_bytes": run.peak_bytes,
        "branch_of": run.branch_of,
        "branch_step": run.branch_step,
    }


# ---- text ------------------------------------------------------------------------------------------------------------
SIGNS: dict[Judgement, str] = {"better": "✔", "worse": "✖", "within noise": "≈", "unknown": "?"}


def comparison_text(comparison: Comparison) -> str:
    """The comparison for people."""
    a, b = comparison.a, comparison.b
    gate = ", ".join(comparison.gate)
    lines = [f"{SIGNS[comparison.judgement]} {b.name} beside {a.name}: {comparison.judgement} ({gate})"]
    lines += [f"  {SIGNS[verdict.judgement]} {verdict.text}" for verdict in comparison.verdicts.values()]
    for run in (a, b):
        if run.branch_of is not None:
            lines.append(f"  {run.name} is a branch of {run.branch_of} at step {run.branch_step}")
    lines += ["", runs_table(a, b)]
    for axis in AXES:
        if rows := loss_table(a, b, axis):
            cells = [(place_text(axis, place), figure_text(x), figure_text(y)) for place, x, y in rows]
            lines += ["", table((f"LOSS BY {axis.upper()}", a.name, b.name), cells, right=(0, 1, 2))]
    if shared := sorted(a.evaluations.keys() & b.evaluations.keys()):
        cells = [(str(step), figure_text(a.evaluations[step]), figure_text(b.evaluations[step])) for step in shared]
        lines += ["", table(("EVALUATION", a.name, b.name), cells[-ROWS:], right=(0, 1, 2))]
    lines += ["", *config_lines(comparison)]
    return "\n".join(lines)


def runs_table(a: RunCurves, b: RunCurves) -> str:
    """The newest figures of both runs."""
    rows = []
    for run in (a, b):
        newest = run.points[-1] if run.points else None
        rows.append(
            (
                run.name,
                run.state,
                str(newest.step) if newest else MISSING,
                figure_text(newest.loss) if newest else MISSING,
                duration_text(newest.time_s) if newest else MISSING,
                count_text(newest.tokens) if newest else MISSING,
                rate_text(newest.tokens_per_s) if newest else MISSING,
                ms_text(newest.step_ms) if newest else MISSING,
                bytes_text(run.peak_bytes),
            )
        )
    header = ("RUN", "STATE", "STEP", "LOSS", "TRAINED", "TOKENS", "SPEED", "STEP TIME", "PEAK")
    return table(header, rows, right=(2, 3, 4, 5, 6, 7, 8))


def config_lines(comparison: Comparison) -> list[str]:
    """The config's keys that differ."""
    if not comparison.config:
        return ["the configs are equal"]
    cells = [(key, value_text(old), value_text(new)) for key, old, new in comparison.config]
    return [table(("CONFIG", comparison.a.name, comparison.b.name), cells)]


def place_text(axis: Axis, place: float) -> str:
    """A place on an axis."""
    if axis == "time":
        return duration_text(place)
    return count_text(place) if axis == "tokens" else f"{place:.0f}"
