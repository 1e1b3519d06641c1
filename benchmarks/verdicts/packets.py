"""The messages that the hub would receive of a simulated run, sampled as the publisher and the probe do it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from benchmarks.verdicts.model import Position, S, SimulatedRun
from runtime.wire.base import Message
from runtime.wire.messages import Collectives, Heartbeat, Hello, Memory, Packet, RunStatus
from runtime.wire.node import BusyProcess, GpuStats, NodeStats

HZ = 5.0
CLOCKS_APART_NS = 3600 * S
"""Ranks' clocks are set this far apart: nothing may compare them."""
HUB_START_S = 1000.0
FULL_CLOCK_MHZ = 1980.0


def packets(run: SimulatedRun) -> Iterator[tuple[float, Packet]]:
    """(seconds, packet) in the order of arrival, after the hellos at second 0."""
    yield 0.0, _packet("supervisor", 0.0, RunStatus(name="t", state="running", attempt=1))
    for rank in range(run.world):
        yield 0.0, _packet(f"rank/{rank}", 0.0, _hello(run, rank))
    ticks = [(1.0 + second, None) for second in range(int(run.seconds) - 1)]
    publishers = [_Publisher(run, rank) for rank in range(run.world)]
    due: list[tuple[float, _Publisher | None]] = list(ticks)
    for publisher in publishers:
        offset_s = run.rng.uniform(0, 1 / HZ)
        due += [(1.0 + offset_s + number / HZ, publisher) for number in range(int((run.seconds - 1) * HZ))]
    for at_s, sender in sorted(due, key=lambda item: item[0]):
        if sender is None:
            yield at_s, _packet("probe/box", at_s, _node(run, at_s))
        elif messages := sender.messages(at_s):
            yield at_s, _packet(f"rank/{sender.rank}", at_s, *messages)


class _Publisher:
    """The telemetry of one rank."""

    def __init__(self, run: SimulatedRun, rank: int) -> None:
        self.run, self.rank = run, rank
        self._reported = self._results = self._place = 0
        self._left = False

    def messages(self, at_s: float) -> list[Message]:
        """What the rank sends at its tick; nothing once it has fallen silent."""
        run, rank = self.run, self.rank
        if rank == run.faulty and at_s >= run.silent_s:
            if run.goodbye is None or self._left:
                return []
            self._left = True
            return [run.goodbye[1]]
        reports = list(takewhile(lambda one: one.at_s <= at_s, run.reports[rank][self._reported :]))
        results = list(takewhile(lambda one: one[0] <= at_s, run.results[rank][self._results :]))
        self._reported += len(reports)
        self._results += len(results)
        by_step: dict[int, list[Any]] = {}
        for report in reports:
            by_step.setdefault(report.step, []).append(report.record)
        found: list[Message] = [
            Collectives.model_construct(rank=rank, step=step, records=records) for step, records in by_step.items()
        ]
        found += [result for _, result in results]
        places = run.positions[rank]
        while self._place + 1 < len(places) and places[self._place + 1].at_s <= at_s:
            self._place += 1
        found.append(_heartbeat(run, rank, places[self._place], at_s))
        if int(at_s * HZ) % int(HZ) == 0:
            found.append(_memory(run, rank, at_s))
        return found


def _packet(source: str, at_s: float, *messages: Message) -> Packet:
    arrival_ns = int((HUB_START_S + at_s) * S)
    return Packet.model_construct(
        source=source, attempt=1, seq=0, sent_ns=0, arrival_ns=arrival_ns, hub_seq=0, messages=list(messages)
    )


def _hello(run: SimulatedRun, rank: int) -> Hello:
    on_gpu = run.machine.name == "gpu"
    return Hello(
        run="t",
        attempt=1,
        rank=rank,
        local_rank=rank,
        world_size=run.world,
        host="box",
        pid=100 + rank,
        boot_id="b",
        wall_s=0.0,
        mono_ns=0,
        device=f"cuda:{rank}" if on_gpu else "cpu",
        device_uuid=f"GPU-{rank}" if on_gpu else "",
        config_digest="d",
        stage=2,
        precision="bf16",
        micro_batch=1,
        accumulation=run.accumulation,
        global_batch=run.world,
    )


def _heartbeat(run: SimulatedRun, rank: int, at: Position, at_s: float) -> Heartbeat:
    apart_ns = CLOCKS_APART_NS * (rank + 1)
    since_ns = int(at.at_s * S) + apart_ns
    return Heartbeat.model_construct(
        rank=rank,
        phase=at.phase,
        phase_since_ns=since_ns,
        step=at.step,
        micro_step=at.micro_step,
        micro_steps=run.accumulation,
        entered_seq=at.entered,
        completed_seq=at.completed,
        entered_op=at.op,
        entered_bytes=at.nbytes,
        progress_ns=since_ns,
        dropped=0,
        now_ns=int(at_s * S) + apart_ns,
    )


def _memory(run: SimulatedRun, rank: int, at_s: float) -> Memory:
    on_s = max(0.0, at_s - run.fault_s) if rank == run.faulty else 0.0
    retries = on_s * (0.5 + run.strength) if run.fault.name == "allocator retries" else 0.0
    faults = on_s * (200 + 2000 * run.strength) if run.fault.name == "paging" else 0.0
    return Memory(
        rank=rank,
        ledger={"parameters": 2**20},
        rss_bytes=2**30,
        host_total_bytes=2**34,
        alloc_retries=int(retries),
        major_faults=7 + int(faults),
        at_ns=int(at_s * S),
    )


def _node(run: SimulatedRun, at_s: float) -> NodeStats:
    name, faulty = run.fault.name if at_s >= run.fault_s else "", run.faulty
    delay = {rank: min(100.0, run.noisy(run.machine.run_delay, 0.5)) for rank in range(run.world)}
    cpu = {rank: run.noisy(95.0, 0.05) for rank in range(run.world)}
    process = dict.fromkeys(range(run.world), "sleeping")
    busy: list[BusyProcess] = []
    if name == "CPU hogs":
        delay[faulty] = min(95.0, run.noisy(45 + 35 * run.strength, 0.15))
        busy = [BusyProcess(pid=9000 + k, name="hog", cpu_percent=run.noisy(60, 0.2)) for k in range(3)]
    elif name == "stopped":
        process[faulty], cpu[faulty] = "stopped", 0.0
    elif name == "GIL held":
        process[faulty], cpu[faulty] = "running", 100.0
    elif name == "killed":
        process[faulty] = "gone"
    return NodeStats(
        host="box",
        cpu_percent=90,
        cpu_count=8,
        load_1m=4.0,
        ram_used_bytes=2**30,
        ram_total_bytes=2**34,
        swap_in_bytes_per_s=20.0 * 2**20 if name == "paging" else 0.0,
        memory_pressure_percent=35.0 if name == "paging" else 0.0,
        rank_cpu_percent=cpu,
        rank_process=process,
        rank_run_delay_percent=delay,
        busy=busy,
        gpus=[_gpu(run, rank, name) for rank in range(run.world)] if run.machine.name == "gpu" else None,
        at_ns=int(at_s * S),
        wall_s=1.0,
    )


def _gpu(run: SimulatedRun, rank: int, name: str) -> GpuStats:
    slow = name == "GPU throttled" and rank == run.faulty
    return GpuStats(
        index=rank,
        uuid=f"GPU-{rank}",
        name="GPU",
        sm_clock_mhz=FULL_CLOCK_MHZ / (run.throttle if slow else 1.0),
        max_sm_clock_mhz=FULL_CLOCK_MHZ,
        clock_reasons=["power cap"] if slow else [],
    )
