"""Simulated runs: seeded, quick, with one fault each.

Ranks compute micro-steps of noisy length, issue their reduce-scatters while they go backward, and are held in each
collective until the last rank has entered it. Noise is that of one of the machines in faults.py, plus rare long pauses.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

from benchmarks.verdicts.faults import MACHINES, Fault
from runtime.wire.messages import Goodbye, StepResult

S = 1_000_000_000
UNITS = 4
MIB = 2**20
SLOW_FIRST_STEPS, FIRST_FACTOR = 2, 8.0
"""The first steps compile and allocate."""
FALLS_SILENT = frozenset({"stopped", "GIL held", "killed"})
STANDS_STILL = FALLS_SILENT | {"hangs in data", "ends early"}


class Position(NamedTuple):
    """Where a rank is from `at_s` on, as its heartbeats say it."""

    at_s: float
    phase: str
    step: int
    micro_step: int
    entered: int
    op: str
    nbytes: int
    completed: int


class Report(NamedTuple):
    """A finished collective of one rank: when it can be reported, in which step, and the record of `Collectives`."""

    at_s: float
    step: int
    record: tuple[Any, ...]


class SimulatedRun:
    """One run of `seconds` seconds. All of it is computed when it is made; packets.py turns it into messages."""

    def __init__(self, fault: Fault, seed: int, seconds: float = 60.0) -> None:
        self.fault, self.seed, self.seconds = fault, seed, seconds
        rng = self.rng = random.Random(f"{fault.name}/{seed}")
        self.world = rng.choice((2, 2, 4, 8))
        self.machine = self._choose_machine()
        self.accumulation = rng.choice((1, 2, 4))
        self.compute_ms = rng.uniform(40, 150)
        self.transfer_ms = rng.uniform(4, 12) if fault.name == "slow link" else rng.uniform(1, 6)
        self.faulty = rng.randrange(self.world)
        self.fault_s = rng.uniform(20, 28)
        self.strength = rng.uniform(0.0, 1.0)
        """0..1: how bad the fault is, within its kind."""
        self.quiet_at_s = rng.uniform(10, 50) if fault.name == "healthy" and rng.random() < 0.5 else math.inf
        self.quiet_phase, self.quiet_s = rng.choice(("checkpoint", "eval")), rng.uniform(0.5, 12.0)
        self.hidden_at_s = self.fault_s if fault.name == "healthy" and self.seed % 2 else math.inf
        """From when on transfers take longer that computing hides: of no consequence."""
        self.positions: dict[int, list[Position]] = {rank: [] for rank in range(self.world)}
        self.reports: dict[int, list[Report]] = {rank: [] for rank in range(self.world)}
        self.results: dict[int, list[tuple[float, StepResult]]] = {rank: [] for rank in range(self.world)}
        self.goodbye: tuple[float, Goodbye] | None = None
        self.silent_s = math.inf
        """From when on nothing is heard of the faulty rank."""
        self._now = dict.fromkeys(range(self.world), 1.0)
        self._completed = dict.fromkeys(range(self.world), 0)
        self._drift = dict.fromkeys(range(self.world), 1.0)
        self._seq, self._step, self._group_free_s = 0, 0, 0.0
        self._phase_ms: dict[int, dict[str, float]] = {}
        self._wait_ms: dict[int, dict[str, float]] = {}
        while min(self._now.values()) < seconds + 5 and self._take_step():
            pass

    def noisy(self, mean: float, variation: float) -> float:
        """A log-normal value with this mean and coefficient of variation."""
        sigma = math.sqrt(math.log1p(variation * variation))
        return mean * self.rng.lognormvariate(-sigma * sigma / 2, sigma)

    def _choose_machine(self) -> Any:
        if self.fault.name in ("GPU throttled", "allocator retries"):
            return MACHINES[0]
        if self.fault.name == "CPU hogs":
            return self.rng.choice(MACHINES[1:])
        return self.rng.choice(MACHINES if self.fault.loud else MACHINES[:2])

    # ---- one step --------------------------------------------------------------------------------------------------
    def _take_step(self) -> bool:
        """Whether the run goes on after it."""
        self._step += 1
        self._on = min(self._now.values()) >= self.fault_s
        self._phase_ms = {rank: {} for rank in range(self.world)}
        self._wait_ms = {rank: {} for rank in range(self.world)}
        began = dict(self._now)
        for micro_step in range(1, self.accumulation + 1):
            if not self._take_micro_step(micro_step):
                return False
        self._update()
        for rank in range(self.world):
            waits = self._wait_ms[rank]
            result = StepResult(
                rank=rank,
                step=self._step,
                loss=2.0,
                lr=1e-3,
                grad_norm=1.0,
                step_ms=1000 * (self._now[rank] - began[rank]),
                tokens_per_s=1000.0,
                wait_ms=sum(waits.values()),
                phase_ms=self._phase_ms[rank],
                phase_wait_ms=waits,
                end_ns=int(self._now[rank] * S),
            )
            self.results[rank].append((self._now[rank], result))
        return True

    def _take_micro_step(self, micro_step: int) -> bool:
        issued: list[dict[int, float]] = [{} for _ in range(UNITS)]
        for rank in range(self.world):
            self._enter(rank, "data", micro_step)
            self._spend(rank, "data", self._data_ms(rank))
            if self._on and rank == self.faulty and self.fault.name in STANDS_STILL:
                self._stand_still(micro_step)
                return False
            compute_ms = self._compute_ms(rank)
            self._enter(rank, "forward", micro_step)
            self._spend(rank, "forward", compute_ms / 3)
            self._enter(rank, "backward", micro_step)
            begin = self._now[rank]
            self._spend(rank, "backward", compute_ms * 2 / 3)
            for unit in range(UNITS):
                issued[unit][rank] = begin + (self._now[rank] - begin) * (unit + 1) / UNITS
        for unit in range(UNITS):
            if self._on and self.fault.name in ("transfer hangs", "other order"):
                self._never_complete(micro_step)
                return False
            self._meet("reduce_scatter", (unit + 1) * MIB, issued[unit], "reduce", micro_step, unit == UNITS - 1)
        return True

    def _update(self) -> None:
        """The end of a step: statistics, update, all-gather, and perhaps a checkpoint or an evaluation."""
        for rank in range(self.world):
            self._enter(rank, "step", self.accumulation)
        self._meet("all_reduce", 16, dict(self._now), "step", 0, True)
        for rank in range(self.world):
            self._spend(rank, "step", self.noisy(0.05 * self.compute_ms, 0.1))
            if self._on and self.fault.name == "offload waits":
                self._enter(rank, "offload", 0)
                whole_ms = self.compute_ms * self.accumulation
                self._spend(rank, "offload", self.noisy(whole_ms * (0.7 + self.strength), 0.1))
        for unit in range(UNITS):
            self._meet("all_gather", (unit + 1) * MIB, dict(self._now), "gather", 0, True)
        if min(self._now.values()) >= self.quiet_at_s:
            self.quiet_at_s = math.inf
            for rank in range(self.world):
                self._enter(rank, self.quiet_phase, 0)
                self._spend(rank, self.quiet_phase, 1000 * self.quiet_s)

    # ---- how long things take --------------------------------------------------------------------------------------
    def _data_ms(self, rank: int) -> float:
        usual_ms, name = self.noisy(1.0, 0.3), self.fault.name
        slow = name == "slow loaders" or (name == "slow loader" and rank == self.faulty)
        return usual_ms + (self.noisy(self.fault.slow_ms * (0.6 + self.strength), 0.3) if self._on and slow else 0.0)

    def _compute_ms(self, rank: int) -> float:
        machine, name = self.machine, self.fault.name
        # Neighbours come and go: noise is not independent from step to step.
        self._drift[rank] = 1 + 0.9 * (self._drift[rank] - 1) + self.rng.gauss(0, machine.noise / 4)
        compute_ms = self.noisy(self.compute_ms, machine.noise) * max(0.5, self._drift[rank])
        if self.rng.random() < 1 / (machine.pause_every * self.accumulation):
            compute_ms += 1000 * self.rng.uniform(0.2, 1.0) * machine.pause_s
        if self._step <= SLOW_FIRST_STEPS:
            compute_ms *= FIRST_FACTOR
        if not self._on or rank != self.faulty:
            return compute_ms
        if name.startswith("slowed"):
            return compute_ms + self.fault.slow_ms
        if name == "GPU throttled":
            return compute_ms * self.throttle
        if name == "CPU hogs":
            return compute_ms * self.noisy(1.5 + 1.5 * self.strength, 0.25)
        if name == "allocator retries":
            return compute_ms + self.noisy(30, 0.5)
        if name == "paging":
            return compute_ms * self.noisy(1.5 + self.strength, 0.3)
        return compute_ms

    @property
    def throttle(self) -> float:
        """How much slower a throttled GPU is."""
        return 1.15 + 0.5 * self.strength

    # ---- what ranks do ---------------------------------------------------------------------------------------------
    def _spend(self, rank: int, phase: str, ms: float) -> None:
        self._phase_ms[rank][phase] = self._phase_ms[rank].get(phase, 0.0) + ms
        self._now[rank] += ms / 1000

    def _enter(self, rank: int, phase: str, micro_step: int, op: str = "", nbytes: int = 0) -> None:
        self.positions[rank].append(
            Position(self._now[rank], phase, self._step, micro_step, self._seq, op, nbytes, self._completed[rank])
        )

    def _meet(self, op: str, nbytes: int, issued: dict[int, float], phase: str, micro_step: int, block: bool) -> None:
        """One collective. issued: rank -> when it enters. block: whether the ranks wait for its end."""
        self._seq += 1
        transfer_ms = self.noisy(self.transfer_ms * (1.0 if nbytes >= MIB else 0.1), self.machine.transfer_noise)
        if self._on and self.fault.name == "slow link":
            transfer_ms *= 2.5 + 4 * self.strength
        if not block and min(issued.values()) >= self.hidden_at_s:
            # The next unit's transfer is issued after this time, and does not wait for this one.
            transfer_ms = max(transfer_ms, self.noisy(0.7 * self.compute_ms * 2 / 3 / UNITS, 0.1))
        free_s = self._group_free_s
        end_s = self._group_free_s = max(*issued.values(), free_s) + transfer_ms / 1000
        for rank, issue_s in issued.items():
            duration_s = end_s - max(issue_s, free_s)
            blocked_s = max(0.0, end_s - self._now[rank]) if block else 0.0
            record = (
                self._seq,
                op,
                nbytes,
                int(issue_s * S),
                int(end_s * S),
                int(1e6 * duration_s),
                int(1e6 * blocked_s),
            )
            self.reports[rank].append(Report(max(end_s, self._now[rank]), self._step, record))
            if blocked_s > 0:
                self._enter(rank, phase, micro_step, op, nbytes)
                self._spend(rank, phase, 1000 * blocked_s)
                self._wait_ms[rank][phase] = self._wait_ms[rank].get(phase, 0.0) + 1000 * blocked_s
            self._completed[rank] = self._seq

    # ---- ranks that go no further ----------------------------------------------------------------------------------
    def _stand_still(self, micro_step: int) -> None:
        """The faulty rank stays where it is, or leaves; the others reach the next collective and wait."""
        rank, name = self.faulty, self.fault.name
        now_s = self._now[rank]
        self._enter(rank, "backward" if name in FALLS_SILENT else "data", micro_step)
        if name in FALLS_SILENT or name == "ends early":
            self.silent_s = now_s
        if name == "ends early":
            self.goodbye = (now_s, Goodbye(rank=rank, outcome="finished", step=self._step - 1, wall_s=0.0))
        self._seq += UNITS
        for other in range(self.world):
            if other != rank:
                compute_s = self.noisy(self.compute_ms, self.machine.noise) / 1000
                self._now[other] = max(now_s, self._now[other]) + compute_s
                self._enter(other, "reduce", micro_step, "reduce_scatter", UNITS * MIB)

    def _never_complete(self, micro_step: int) -> None:
        """All ranks enter a collective that does not complete; under "other order" the faulty one another."""
        self._seq += 1
        for rank in range(self.world):
            other = self.fault.name == "other order" and rank == self.faulty
            self._enter(rank, "reduce", micro_step, "reduce_scatter", 2 * MIB if other else MIB)
