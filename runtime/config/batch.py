"""Batch arithmetic: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import Findings

DEFAULT_MICRO_BATCH = 4
"""Sequences per rank and micro-step when the config gives no batch size, or "auto"."""

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
    """The three batch sizes of a run."""

    micro: int
    """Samples per rank and micro-step."""
    accumulation: int
    """Micro-steps per optimizer step."""
    total: int
    """Samples per optimizer step, over all ranks."""


def solve(
    total: int | None, micro: int | None, accumulation: int | None, ranks: int, auto: set[str], found: Findings,
    notes: list[str],
) -> Batch | None:  # fmt: skip
    """Complete the given numbers (None: absent) as DeepSpeed does; None after recording a problem.

    Any two give the third; one size alone means no accumulation. `auto`: the keys that are "auto".
    """
    if total is None and micro is None:
        if accumulation is not None and not auto & {TRAIN, MICRO}:
            found.problem((ACCUMULATION,), f": does not determine the batch size alone; add {MICRO} or {TRAIN}")
            return None
        micro = DEFAULT_MICRO_BATCH
        notes.append(f"{MICRO}: {micro}, the default")
    if total is None:
        steps = accumulation or 1
        return Batch(micro or 1, steps, (micro or 1) * steps * ranks)
    if micro is None:
        steps = accumulation or 1
        if total % (steps * ranks):
            found.problem((TRAIN,), _indivisible(total, None, steps, ranks))
            return None
        return Batch(total // (steps * ranks), steps, total)
    if accumulation is None:
        if total % (micro * ranks):
            found.problem((TRAIN,), _indivisible(total, micro, None, ranks))
            return None
        return Batch(micro, total // (micro * ranks), total)
    if total != micro * accumulation * ranks:
        found.problem((TRAIN,), _unequal(total, micro, accumulation, ranks))
        return None
    return Batch(micro, accumulation, total)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count != 1 else ''}"


def _unequal(total: int, micro: int, accumulation: int, ranks: int) -> str:
    product = micro * accumulation * ranks
    ways = [f"{TRAIN} {product}"]
    for key, divisor in ((ACCUMULATION, micro * ranks), (MICRO, accumulation * ranks)):
        if total % divisor == 0:
            ways.append(f"{key} {total // divisor}")
    if total % (micro * accumulation) == 0:
        ways.append(_ranks(total // (micro * accumulation)))
    return (
        f": {total} != {micro} x {accumulation} x {ranks} = {product} "
        f"({TRAIN} != {MICRO} x {ACCUMULATION} x ranks)\nAny one of these works: {', or '.join(ways)}"
    )


def _indivisible(total: int, micro: int | None, accumulation: int | None, ranks: int) -> str:
    """`total` and one of the other two are given (`accumulation` 1 also stands for not given)."""
    given, key = (micro, MICRO) if micro is not None else (accumulation or 1, ACCUMULATION)
    block = given * ranks
    ways = [f"{TRAIN} {size}" for size in _around(total, block)]
    if total % ranks == 0 and given > 1:
        ways += [f"{key} {size}" for size in _divisors_near(total // ranks, given)]
    if total % given == 0:
        ways += [_ranks(count) for count in _divisors_near(total // given, ranks)]
    each = f"{key} {given} x {_ranks(ranks)} = {block}" if given > 1 or micro is not None else _ranks(ranks)
    return f": {total} does not divide by {each}\nAny one of these works: {', or '.join(ways)}"


def _around(number: int, step: int) -> list[int]:
    """The multiples of `step` next to `number`, from 1 on."""
    below = number // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` below `wanted` and the smallest above."""
    # Batch sizes are small, but nothing bounds what someone types: the search stops after a thousand tries each way.
    below = next((d for d in range(wanted - 1, max(0, wanted - 1000), -1) if number % d == 0), None)
    above = next((d for d in range(wanted + 1, min(number, wanted + 1000) + 1) if number % d == 0), None)
    return [divisor for divisor in (below, above) if divisor is not None]
