"""A recording played into the verdict code, as it was or perturbed, and repeated for as long as one likes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.verdicts.recording import Item, Line, Recording
from runtime.wire.codec import rank_of
from runtime.wire.messages import Packet, up_adapter

S = 1_000_000_000
HUB_START_S = 1000.0
RATES = {"tokens_per_s", "samples_per_s"}
CLOCKS = ("phase_since_ns", "progress_ns", "now_ns", "end_ns", "at_ns", "mono_ns")
"""Fields on the clock of the rank or node."""


@dataclass(frozen=True)
class Perturbation:
    """What a replay changes. `ranks[r]` is the new number of rank r; `skipped_s`: of how many seconds the steps are
    missing at the beginning, as if the hub had come late; `speed`: all times are multiplied by it; `noise`: coefficient
    of variation of a factor on each duration; `lost`: share of the ranks' packets that never arrive; `late_s`: the most
    that a packet takes longer."""

    seed: int = 0
    ranks: tuple[int, ...] = ()
    skipped_s: float = 0.0
    speed: float = 1.0
    noise: float = 0.0
    lost: float = 0.0
    late_s: float = 0.0

    @staticmethod
    def drawn(seed: int, recording: Recording) -> Perturbation:
        """The perturbation of this seed, within what another machine of the same kind might do."""
        rng = random.Random(f"{recording.fault}/{seed}")
        world = max((rank_of(source) or 0) for _, source, _ in recording.lines) + 1
        return Perturbation(
            seed=seed,
            ranks=tuple(rng.sample(range(world), world)),
            skipped_s=rng.uniform(0.0, recording.fault_s / 3 if recording.fault_s else 5.0),
            speed=rng.uniform(0.7, 1.5),
            noise=rng.uniform(0.0, 0.1),
            lost=rng.uniform(0.0, 0.02),
            late_s=rng.uniform(0.0, 0.05),
        )


def packet_of(at_s: float, source: str, messages: list[Item]) -> Packet:
    """As the hub publishes it."""
    arrival_ns = int((HUB_START_S + at_s) * S)
    return Packet.model_construct(
        source=source,
        attempt=1,
        seq=0,
        sent_ns=0,
        arrival_ns=arrival_ns,
        hub_seq=0,
        messages=[up_adapter.validate_python(message) for message in messages],
    )


def packets(recording: Recording, change: Perturbation | None = None) -> Iterator[tuple[float, Packet]]:
    """(seconds, packet) in the order of arrival."""
    for at_s, source, messages in perturbed(recording, change) if change is not None else recording.lines:
        yield at_s, packet_of(at_s, source, messages)


# ---- perturbed -------------------------------------------------------------------------------------------------------
def perturbed(recording: Recording, change: Perturbation) -> list[Line]:
    """The lines of the recording with this change."""
    rng, last_s = random.Random(change.seed), dict[str, float]()
    changer = _Changer(change, rng)
    lines: list[Line] = []
    for at_s, source, messages in recording.lines:
        rank = rank_of(source)
        if rank is not None and rng.random() < change.lost and not _has_events(messages):
            continue
        kept = [one for one in messages if at_s >= change.skipped_s or one["kind"] not in ("step", "collectives")]
        # What a source sends stays in order.
        arrives_s = max(last_s.get(source, 0.0), at_s * change.speed + rng.uniform(0.0, change.late_s) * (at_s > 0))
        last_s[source] = arrives_s
        name = source if rank is None else f"rank/{changer.number(rank)}"
        lines.append((arrives_s, name, [changer.message(one) for one in kept]))
    return sorted(lines, key=lambda line: line[0])


def _has_events(messages: list[Item]) -> bool:
    """Whether the packet came over the channel that loses nothing."""
    return any(one["kind"] in ("hello", "goodbye") for one in messages)


class _Changer:
    def __init__(self, change: Perturbation, rng: random.Random) -> None:
        self._change, self._rng = change, rng

    def number(self, rank: int) -> int:
        return self._change.ranks[rank] if self._change.ranks else rank

    def _took(self, duration: float) -> float:
        """A duration on this machine."""
        sigma = math.sqrt(math.log1p(self._change.noise**2))
        return duration * self._change.speed * self._rng.lognormvariate(-sigma * sigma / 2, sigma)

    def message(self, message: Item) -> Item:
        """The message as it would be with this change."""
        changed: dict[str, Any] = dict(message)
        if isinstance(changed.get("rank"), int):
            changed["rank"] = self.number(changed["rank"])
        for clock in CLOCKS:
            if clock in changed:
                changed[clock] = int(changed[clock] * self._change.speed)
        match message["kind"]:
            case "hello":
                changed["local_rank"] = changed["rank"]
            case "status":
                if changed.get("failed_rank") is not None:
                    changed["failed_rank"] = self.number(changed["failed_rank"])
            case "node":
                for name in changed:
                    if name.startswith("rank_"):
                        changed[name] = {str(self.number(int(rank))): value for rank, value in changed[name].items()}
            case "step":
                self._change_step(changed)
            case "collectives":
                changed["records"] = [
                    [seq, op, size, issue, end, int(took), int(min(took, wait_us * self._change.speed))]
                    for seq, op, size, issue, end, duration_us, wait_us in message["records"]
                    for took in (self._took(duration_us),)
                ]
        return changed

    def _change_step(self, step: Item) -> None:
        before, waited = step.get("phase_ms", {}), step.get("phase_wait_ms", {})
        phases = {phase: self._took(ms) for phase, ms in before.items()}
        waits = {phase: ms * phases[phase] / before[phase] for phase, ms in waited.items() if before.get(phase)}
        step |= {"phase_ms": phases, "phase_wait_ms": waits, "wait_ms": sum(waits.values())}
        whole = sum(before.values())
        step["step_ms"] *= sum(phases.values()) / whole if whole else self._change.speed
        for name in RATES & step.keys():
            step[name] = step[name] and step[name] / self._change.speed


# ---- repeated --------------------------------------------------------------------------------------------------------
def repeated(recording: Recording, seconds: float) -> Recording:
    """The steps of a healthy recording again and again, numbered on, until it is `seconds` long.

    The part between two steps of rank 0, after the first ones and before the last ones, is repeated: steps, collectives
    and clocks continue, and nothing shows where it begins anew.
    """
    ends = {one["step"]: at_s for at_s, _, messages in recording.lines for one in messages if _is_step(one, rank=0)}
    first, last = sorted(ends)[5], sorted(ends)[-5]
    steps, period_s = last - first, ends[last] - ends[first]
    seqs = {step: _newest_seq(recording, step) for step in (first, last)}
    per_round = seqs[last] - seqs[first]
    lines: list[Line] = []
    for at_s, source, messages in recording.lines:
        # A rank may report a step later than rank 0 does.
        if kept := [one for one in messages if (one["step"] <= first if _of_step(one) else at_s <= ends[first])]:
            lines.append((at_s, source, kept))
    for number in range(math.ceil((seconds - ends[first]) / period_s)):
        for at_s, source, messages in recording.lines:
            repeats = ends[first] < at_s <= ends[last]
            kept = [one for one in messages if (first < one["step"] <= last if _of_step(one) else repeats)]
            if kept:
                shifted = [_shifted(one, number * steps, number * per_round, number * period_s) for one in kept]
                lines.append((at_s + number * period_s, source, shifted))
    lines.sort(key=lambda line: line[0])
    return dataclasses.replace(recording, fault_s=0.0, seconds=seconds, lines=lines)


def _is_step(message: Item, rank: int) -> bool:
    return bool(message["kind"] == "step" and message["rank"] == rank)


def _newest_seq(recording: Recording, step: int) -> int:
    """The last collective of a step."""
    return max(
        record[0]
        for _, _, messages in recording.lines
        for one in messages
        if one["kind"] == "collectives" and one["step"] == step
        for record in one["records"]
    )


def _of_step(message: Item) -> bool:
    """Whether the message is the report of a step; others are repeated by when they came."""
    return message["kind"] in ("step", "collectives")


def _shifted(message: Item, steps: int, seqs: int, seconds: float) -> Item:
    shifted: dict[str, Any] = dict(message)
    for name in ("step", "entered_seq", "completed_seq"):
        if name in shifted:
            shifted[name] += steps if name == "step" else seqs
    for clock in CLOCKS:
        if clock in shifted:
            shifted[clock] += int(seconds * S)
    if message["kind"] == "collectives":
        shifted["records"] = [[seq + seqs, *rest] for seq, *rest in message["records"]]
    return shifted
