"""Bounds the size of data reports and evaluations: each is sent to every screen, and kept in the recording.

A report of data with long rows, or an evaluation with many prompts, must neither exceed a frame (outbox.py) nor be
dropped for it. What is cut off is what a screen can show least of: the ends of long examples, long lists.
"""

from __future__ import annotations

from runtime.telemetry.bounds import shortened
from runtime.wire.finetuning import DataReport, DataSample, Evaluation, Generation, TokenRun

FILES_KEPT = 21
"""Twenty files, and a line that counts the others."""
BINS_KEPT = 32
REASONS_KEPT = 32
NOTES_KEPT = 40
EXAMPLES_KEPT = 16
RUNS_KEPT = 2_000
"""Most runs of an example."""
EXAMPLE_KEPT = 16_000
"""Most characters of an example."""
LINE_KEPT = 1_000
"""Most characters of a file name, a note, or a reason."""
GENERATIONS_KEPT = 64
GENERATION_KEPT = 16_000
"""Most characters of a generated text; of a prompt a quarter."""
EVALUATION_KEPT = 128_000
"""Most characters of all generated texts of an evaluation."""


def clipped_report(report: DataReport) -> DataReport:
    """`report` within the bounds of this module."""
    files = [shortened(name, LINE_KEPT) for name in report.files]
    if len(files) > FILES_KEPT:
        files = [*files[: FILES_KEPT - 1], f"and {len(files) - FILES_KEPT + 1:,} more"]
    reasons = sorted(report.dropped.items(), key=lambda item: -item[1])
    dropped = {shortened(name, LINE_KEPT): count for name, count in reasons[:REASONS_KEPT]}
    if rest := sum(count for _, count in reasons[REASONS_KEPT:]):
        dropped["other reasons"] = dropped.get("other reasons", 0) + rest
    changes = {
        "files": files,
        "template": shortened(report.template, LINE_KEPT),
        "dropped": dropped,
        "lengths": _merged(report.lengths),
        "examples": [_clipped_sample(sample) for sample in report.examples[:EXAMPLES_KEPT]],
        "notes": [shortened(note, LINE_KEPT) for note in report.notes[:NOTES_KEPT]],
    }
    return report.model_copy(update=changes)


def clipped_evaluation(evaluation: Evaluation) -> Evaluation:
    """`evaluation` within the bounds of this module."""
    texts = evaluation.generations[:GENERATIONS_KEPT]
    each = min(GENERATION_KEPT, EVALUATION_KEPT // max(1, len(texts)))
    clipped = [
        Generation(prompt=shortened(text.prompt, each // 4), text=shortened(text.text, each), tokens=text.tokens)
        for text in texts
    ]
    return evaluation.model_copy(update={"generations": clipped})


def _merged(lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The histogram in at most BINS_KEPT bins: neighbours are joined."""
    joined = -(-len(lengths) // BINS_KEPT)
    if joined <= 1:
        return lengths
    groups = [lengths[at : at + joined] for at in range(0, len(lengths), joined)]
    return [(group[-1][0], sum(count for _, count in group)) for group in groups]


def _clipped_sample(sample: DataSample) -> DataSample:
    """The beginning of the sample. The tokens of what is cut off are estimated from its characters."""
    kept: list[TokenRun] = []
    characters = 0
    for run in sample.runs[:RUNS_KEPT]:
        room = EXAMPLE_KEPT - characters
        if room <= 0:
            break
        kept.append(run if len(run.text) <= room else run.model_copy(update={"text": run.text[:room]}))
        characters += len(kept[-1].text)
    whole = sum(len(run.text) for run in sample.runs)
    changes: dict[str, object] = {"source": shortened(sample.source, LINE_KEPT)}
    if characters < whole or len(kept) < len(sample.runs):
        shown = max(0, sample.tokens - sample.left_out)
        cut = round(shown * (1 - characters / whole)) if whole else shown
        changes |= {"runs": kept, "left_out": sample.left_out + max(1, cut)}
    return sample.model_copy(update=changes)
