"""What a person should see of prepared data: counts, lengths, and samples as the model sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.data.conversations.encode import Recipe
from runtime.data.conversations.packing import Plan
from runtime.data.conversations.store import Store
from runtime.wire.finetuning import DataReport, DataSample, TokenRun

EXAMPLES = 8
_SHOWN_TOKENS = 1024
_BINS = 24
_LISTED_FILES = 20

Decode = Callable[[list[int]], str]


def make_report(
    role: Literal["train", "evaluation"],
    store: Store,
    plan: Plan,
    recipe: Recipe,
    decode: Decode,
    names: dict[int, str],
    *,
    template: str,
    packed: bool,
    set_aside: dict[str, int],
    held_out: bool = False,
    cached: bool = False,
    complete: bool = True,
) -> DataReport:
    """The report on the sequences of a plan. names: texts of special tokens by id.

    set_aside: numbers of samples that the plan leaves out, by reason. held_out: the plan is of a part of the training
    data, so that the rows of the store that are none of its samples do not count.
    """
    meta = store.meta
    dropped = {} if held_out else meta["dropped"]
    chosen, times = np.unique(plan.samples, return_counts=True)
    lengths, cut = store.lengths[chosen], store.cut[chosen]
    forms = sorted({form for form in meta["forms"] if form})
    files = list(meta["files"])
    if len(files) > _LISTED_FILES:
        files = [*files[:_LISTED_FILES], f"and {len(files) - _LISTED_FILES:,} more"]
    return DataReport(
        role=role,
        files=files,
        format=", ".join(forms),
        template=template,
        train_on=_train_on(recipe, forms),
        rows=len(chosen) + sum(set_aside.values()) if held_out else meta["rows"],
        samples=len(chosen),
        dropped=dropped,
        set_aside=set_aside,
        truncated=int((cut > 0).sum()),
        truncated_tokens=int(cut.sum(dtype=np.int64)),
        tokens=int((lengths.astype(np.int64) * times).sum()),
        trained_tokens=int(plan.counted.sum(dtype=np.int64)),
        seq_len=recipe.seq_len,
        sequences=len(plan),
        packed=packed,
        vocab_size=recipe.vocab_size,
        lengths=histogram(lengths),
        examples=_examples(store, plan, decode, names),
        notes=_notes(meta, dropped, lengths, cut, recipe.seq_len),
        seconds=0.0 if cached else meta["seconds"],
        complete=complete,
    )


def _train_on(recipe: Recipe, forms: list[str]) -> str:
    if recipe.train_on != "auto":
        return recipe.train_on
    kinds = {"text": "all", "prompt-completion": "completion"}
    if not recipe.templates:
        kinds["alpaca"] = "completion"
    return ", ".join(sorted({kinds.get(form, "assistant") for form in forms}))


def histogram(lengths: np.ndarray, bins: int = _BINS) -> list[tuple[int, int]]:
    """(length, samples of at most this many tokens and more than the bin before), in steps of a round number."""
    if not len(lengths):
        return []
    longest = int(lengths.max())
    width = next(
        step * 10**power for power in range(12) for step in (1, 2, 5) if -(-longest // (step * 10**power)) <= bins
    )
    counts = np.bincount((lengths.astype(np.int64) - 1) // width, minlength=-(-longest // width))
    return [((index + 1) * width, int(count)) for index, count in enumerate(counts)]


def _examples(store: Store, plan: Plan, decode: Decode, names: dict[int, str]) -> list[DataSample]:
    """Sequences spread evenly over the plan."""
    count = min(EXAMPLES, len(plan))
    picked = [index * len(plan) // count for index in range(count)] if count else []
    return [example(store, plan.of(sequence), decode, names) for sequence in picked]


def example(store: Store, samples: np.ndarray, decode: Decode, names: dict[int, str]) -> DataSample:
    """A sequence as runs of neighbouring tokens that are alike."""
    runs: list[TokenRun] = []
    tokens = trained = shown = 0
    for document, sample in enumerate(samples.tolist()):
        first, last = int(store.offsets[sample]), int(store.offsets[sample + 1])
        tokens += last - first
        trained += int(store.counted[sample])
        kept = min(last - first, _SHOWN_TOKENS - shown)
        if kept > 0:
            ids = store.tokens[first : first + kept].tolist()
            mask = store.trained[first : first + kept].astype(bool)
            mask[0] = False  # nothing predicts it
            runs += _runs(ids, mask.tolist(), decode, names, edge=document > 0)
            shown += kept
    return DataSample(
        source=_source(store, samples), tokens=tokens, trained=trained, runs=runs, left_out=tokens - shown
    )


def _source(store: Store, samples: np.ndarray) -> str:
    files: dict[str, list[int]] = {}
    for sample in samples.tolist():
        name = Path(store.meta["files"][int(store.files[sample])]).name
        files.setdefault(name, []).append(int(store.numbers[sample]))
    parts = []
    for name, numbers in files.items():
        listed = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
        parts.append(f"{name} {'row' if len(numbers) == 1 else 'rows'} {listed}")
    return "; ".join(parts)


def _runs(ids: list[int], mask: list[bool], decode: Decode, names: dict[int, str], edge: bool) -> list[TokenRun]:
    runs: list[TokenRun] = []
    at = 0
    while at < len(ids):
        end = at + 1
        if ids[at] in names:
            runs.append(TokenRun(text=names[ids[at]], trained=mask[at], special=True, edge=edge and at == 0))
        else:
            while end < len(ids) and mask[end] == mask[at] and ids[end] not in names:
                end += 1
            runs.append(TokenRun(text=decode(ids[at:end]), trained=mask[at], edge=edge and at == 0))
        at = end
    return runs


def _notes(
    meta: dict[str, Any], dropped: dict[str, int], lengths: np.ndarray, cut: np.ndarray, seq_len: int
) -> list[str]:
    """What a person should know about prepared data. lengths, cut: of its samples."""
    notes = []
    seen = set()
    for form, columns in zip(meta["forms"], meta["columns"], strict=True):
        if form and (form, tuple(columns)) not in seen:
            seen.add((form, tuple(columns)))
            listed = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
            notes.append(f"columns {listed}: recognised as {form}")
    for reason, count in sorted(dropped.items()):
        notes.append(f"{count:,} of {meta['rows']:,} rows left out: {reason}")
    if truncated := int((cut > 0).sum()):
        lost = int(cut.sum(dtype=np.int64))
        share = lost / (int(lengths.sum(dtype=np.int64)) + lost)
        notes.append(f"{truncated:,} samples cut to {seq_len:,} tokens; {lost:,} tokens ({share:.1%}) lost")
    return notes
