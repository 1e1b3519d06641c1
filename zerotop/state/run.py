"""RunState: every message of a run is folded in by `apply`, and everything that shows or reports the run reads its
fields.

The hub, the screen and `zerotop status` fold the same messages, so they cannot disagree.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from runtime.wire.base import Message
from runtime.wire.codec import rank_of
from runtime.wire.finetuning import DataReport, Evaluation
from runtime.wire.judgement import Alert, TimeReport, Verdict
from runtime.wire.messages import (
    CheckpointSaved,
    Collectives,
    Command,
    CommandRecord,
    CountedCollectives,
    Event,
    Goodbye,
    Heartbeat,
    Hello,
    LogRecord,
    Memory,
    Packet,
    Phases,
    RunStatus,
    Snapshot,
    StepResult,
)
from runtime.wire.node import NodeStats
from zerotop.state.breakdown import Breakdowns
from zerotop.state.energy import Energy, EnergyUse, energy_use
from zerotop.state.evaluations import Evaluations
from zerotop.state.events import Record
from zerotop.state.histories import Histories
from zerotop.state.series import Series
from zerotop.state.waits import Waits

EVENTS_KEPT = 500
_WAITS_FOR = {"abort": "ending the ranks", "stacks": "the ranks are being asked"}
"""What happens to an accepted command that does not wait for a step boundary."""
COMMANDS_KEPT = 100
GAP_COUNTED = 10**6
"""A larger gap in packet numbers is not a loss but another numbering."""


@dataclass
class RankState:
    """The newest message of each kind from one rank."""

    rank: int
    hello: Hello | None = None
    heartbeat: Heartbeat | None = None
    step: StepResult | None = None
    memory: Memory | None = None
    goodbye: Goodbye | None = None
    spans: deque[tuple[str, int, int, int, int]] = field(default_factory=lambda: deque(maxlen=256))
    """Newest phase intervals: (phase, step, micro_step, start_ns, end_ns)."""
    collectives: deque[tuple[int, str, int, int, int, int, int]] = field(default_factory=lambda: deque(maxlen=256))
    """Newest collectives: (seq, op, bytes, issue_ns, end_ns, duration_us, wait_us), as in `Collectives.records`."""
    counted: list[CountedCollectives] = field(default_factory=list)
    """All collectives of a recent step of a trainer that is not ours: as in `Collectives.counted`."""
    counted_step: int = 0
    heard_ns: int = 0
    """When the newest packet arrived at the hub, on its monotonic clock."""
    packets_lost: int = 0
    last_seq: dict[str, int] = field(default_factory=dict)

    @property
    def comm_bytes(self) -> int | None:
        """Bytes of the collectives of a recent step; None before the first."""
        if self.counted:
            return sum(nbytes * count for _, nbytes, count, _ in self.counted)
        return self.step.comm_bytes if self.step is not None else None

    @property
    def phase(self) -> str:
        """The current phase; once the rank has left, how it left."""
        if self.goodbye is not None:
            return self.goodbye.outcome
        return self.heartbeat.phase if self.heartbeat else "init"

    @property
    def current_step(self) -> int | None:
        """The step that the rank works on; once it has left, the last one that it finished."""
        if self.goodbye is not None:
            return self.goodbye.step
        return self.heartbeat.step if self.heartbeat else None


@dataclass
class RunState:
    """The state of a run."""

    status: RunStatus | None = None
    verdict: Verdict | None = None
    """The hub's judgement; None before the first."""
    alerts: dict[str, Alert] = field(default_factory=dict)
    """By name: the newest state of each rule that has ever held."""
    time_report: TimeReport | None = None
    """Where the hub has found the time of the recent steps to go; None before the first."""
    ranks: dict[int, RankState] = field(default_factory=dict)
    nodes: dict[str, NodeStats] = field(default_factory=dict)
    energy: Energy = field(default_factory=Energy)
    events: deque[Record] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    commands: dict[str, CommandRecord] = field(default_factory=dict)  # by command id, oldest first
    series: Series = field(default_factory=Series)
    evaluations: Evaluations = field(default_factory=Evaluations)
    data: dict[str, DataReport] = field(default_factory=dict)
    """By role, "train" or "evaluation": what is trained and evaluated on."""
    waits: Waits = field(default_factory=Waits)
    breakdowns: Breakdowns = field(default_factory=Breakdowns)
    histories: Histories = field(default_factory=Histories)
    answered_ns: dict[str, int] = field(default_factory=dict)
    """Command id -> arrival at the hub of its final state; one that is older than our snapshot has none."""
    hub_seq: int = 0
    hub_now_ns: int = 0
    """The newest arrival stamp: the hub's clock as far as we know it."""
    restarted: bool = False
    """A new attempt has begun, and none of its ranks has reported yet from which step it continues."""
    _folded: dict[str, int] = field(default_factory=dict, compare=False)
    """Kind of message -> how many were folded in."""
    _serial: int = field(default_factory=itertools.count().__next__, compare=False)
    """Tells this state from every other."""
    _data_is_old: bool = False
    """A new attempt has begun, and the data reports are still those of the one before."""
    _lowest: int | None = None
    """The lowest rank that has sent a hello."""

    # ---- input -----------------------------------------------------------------------------------------------------
    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Fold the whole state, as a late screen gets it."""
        self.hub_seq = snapshot.hub_seq
        self.hub_now_ns = snapshot.now_ns
        self.apply_all(snapshot.messages, 0)
        for state in self.ranks.values():
            # The curve reaches back before this attempt; a rank that has finished no step in it has none.
            if state.step is not None and (state.hello is None or state.step.step <= state.hello.start_step):
                state.step = None
        for rank, heard_ns in snapshot.heard_ns.items():
            self.rank(rank).heard_ns = heard_ns

    def apply_packet(self, packet: Packet) -> bool:
        """Fold one packet. False, and nothing happens, if the snapshot already contained it."""
        if packet.hub_seq and packet.hub_seq <= self.hub_seq:
            return False
        self.hub_seq = max(self.hub_seq, packet.hub_seq)
        self.hub_now_ns = max(self.hub_now_ns, packet.arrival_ns)
        number = rank_of(packet.source)
        if number is not None:
            rank = self.rank(number)
            channel = f"{packet.attempt}/{'events' if _is_event_packet(packet) else 'telemetry'}"
            before = rank.last_seq.get(channel)
            if before is not None and before + 1 < packet.seq <= before + GAP_COUNTED:
                rank.packets_lost += packet.seq - before - 1
            rank.last_seq[channel] = packet.seq
        self.apply_all(packet.messages, packet.arrival_ns)
        return True

    def apply_all(self, messages: Iterable[Message], arrival_ns: int) -> None:
        """Fold messages that arrived at the hub at `arrival_ns`."""
        for message in messages:
            self.apply(message, arrival_ns)

    def apply(self, message: Message, arrival_ns: int = 0) -> None:
        """Fold one message. Kinds without a meaning for the state are ignored."""
        kind = getattr(message, "kind", "")
        self._folded[kind] = self._folded.get(kind, 0) + 1
        rank = getattr(message, "rank", None)
        if isinstance(rank, int):
            self.rank(rank).heard_ns = max(self.rank(rank).heard_ns, arrival_ns)
        match message:
            case Hello():
                fresh = self.rank(message.rank)
                if fresh.hello is not None and fresh.hello.attempt != message.attempt:
                    # A new process: nothing of the old one may remain.
                    self.ranks[message.rank] = fresh = RankState(message.rank, heard_ns=fresh.heard_ns)
                    self._forget_steps()
                if self.restarted:
                    self.restarted = False
                    self.series.cut(message.start_step)
                    self.evaluations.cut(message.start_step)
                fresh.hello = message
                fresh.goodbye = None  # its process goes on with another training
                if self._lowest is None or message.rank < self._lowest:
                    self._lowest = message.rank
            case Heartbeat():
                self.rank(message.rank).heartbeat = message
            case Phases():
                self.rank(message.rank).spans.extend(message.spans)
            case StepResult():
                if self.restarted:  # the series notices replayed steps by itself
                    self.restarted = False
                    self.evaluations.cut(message.step - 1)
                self.rank(message.rank).step = message
                self.series.add(message)
                self.waits.step_took(message.step, message.step_ms)
                self.breakdowns.add(message)
                self.histories.step_ended(message)
            case Memory():
                self.rank(message.rank).memory = message
            case Collectives():
                if message.counted:
                    self.rank(message.rank).counted = message.counted
                    self.rank(message.rank).counted_step = message.step
                if message.records:
                    self.rank(message.rank).collectives.extend(message.records)
                    self.waits.add(message, self.world_size)
            case Goodbye():
                self.rank(message.rank).goodbye = message
            case NodeStats():
                self.nodes[message.host] = message
                self.energy.add(message)
                self.histories.node_said(message)
            case DataReport():
                if self._data_is_old:
                    self._data_is_old = False
                    self.data.clear()
                self.data[message.role] = message
            case Evaluation():
                self.evaluations.add(message)
            case Event() | LogRecord() | CheckpointSaved():
                self.events.append(message)
            case CommandRecord():
                self._record(message, arrival_ns)
            case Verdict():
                self.verdict = message
            case Alert():
                self.alerts[message.name] = message
            case TimeReport():
                self.time_report = message
            case RunStatus():
                if self.status and 0 < self.status.attempt < message.attempt:
                    self._begin_attempt()
                self.status = message

    def _begin_attempt(self) -> None:
        """All ranks are new processes: nothing of the old ones may remain."""
        self.ranks.clear()
        self._forget_steps()
        self.series.begin_attempt()
        self.restarted = self._data_is_old = True

    def _forget_steps(self) -> None:
        """A new attempt numbers its collectives from 1, and its speed is another."""
        self.waits = Waits()
        self.breakdowns = Breakdowns()
        self.histories.begin_attempt()
        self.time_report = None

    def _record(self, record: CommandRecord, arrival_ns: int) -> None:
        if record.command.name == "stacks" and record.ack.state == "applied":
            self._forget_stacks()
        self.commands[record.command.id] = record
        if record.ack.state != "accepted" and arrival_ns:
            self.answered_ns.setdefault(record.command.id, arrival_ns)
        while len(self.commands) > COMMANDS_KEPT:
            oldest = next(iter(self.commands))
            del self.commands[oldest]
            self.answered_ns.pop(oldest, None)

    def _forget_stacks(self) -> None:
        """Only the newest stacks are kept: each is a long text, and a late screen is sent all of them."""
        for identity, old in self.commands.items():
            if old.command.name == "stacks" and "text" in old.ack.result:
                rest = {key: value for key, value in old.ack.result.items() if key != "text"}
                self.commands[identity] = old.model_copy(update={"ack": old.ack.model_copy(update={"result": rest})})

    # ---- reading ---------------------------------------------------------------------------------------------------
    def revision(self, kinds: Iterable[str]) -> tuple[int, ...]:
        """Compares equal to an earlier one while no message of these kinds has been folded in since: who shows
        something reads it again only then."""
        return (self._serial, *(self._folded.get(kind, 0) for kind in kinds))

    def rank(self, number: int) -> RankState:
        """The state of one rank, created if it is new."""
        if number not in self.ranks:
            self.ranks[number] = RankState(number)
        return self.ranks[number]

    @property
    def hello(self) -> Hello | None:
        """The lowest rank's hello: values that are equal on all ranks (stage, precision, steps...) are read here."""
        # Cached, because it is read at every message of every rank.
        lowest = self.ranks.get(self._lowest) if self._lowest is not None else None
        if lowest is None or lowest.hello is None:
            known = [number for number, state in self.ranks.items() if state.hello]
            self._lowest = min(known, default=None)
            lowest = self.ranks[self._lowest] if self._lowest is not None else None
        return lowest.hello if lowest is not None else None

    @property
    def world_size(self) -> int:
        """The number of ranks; 0 before the first hello."""
        return self.hello.world_size if self.hello else 0

    @property
    def step(self) -> int:
        """The last optimizer step that every reporting rank has finished."""
        done = [state.step.step for state in self.ranks.values() if state.step]
        if done:
            return min(done)
        return self.hello.start_step if self.hello else (self.status.step if self.status else 0)

    @property
    def loss(self) -> float | None:
        """The loss of the newest step; None before the first."""
        newest = max((s.step for s in self.ranks.values() if s.step), key=lambda r: r.step, default=None)
        return newest.loss if newest else None

    @property
    def state_name(self) -> str:
        """The state of the status; "starting" before there is one."""
        return self.status.state if self.status else "starting"

    def firing(self) -> list[Alert]:
        """The alerts that fire, errors first."""
        those = [alert for alert in self.alerts.values() if alert.state == "firing"]
        return sorted(those, key=lambda alert: alert.severity != "error")

    def energy_use(self) -> EnergyUse | None:
        """What the GPUs of all ranks take per step and per token; None where one of them has no energy counter, and
        until all have reported."""
        newest = self.series.newest
        stamped = self.ranks.get(newest.rank) if newest is not None else None
        gpus: dict[str, set[str]] = {}
        tokens = 0.0
        if len(self.ranks) < self.world_size:
            return None
        for rank in self.ranks.values():
            if rank.hello is None or not rank.hello.device_uuid or rank.step is None:
                return None
            gpus.setdefault(rank.hello.host, set()).add(rank.hello.device_uuid.removeprefix("GPU-"))
            tokens += (rank.step.tokens_per_s or 0.0) * rank.step.step_ms / 1000
        if stamped is None or stamped.hello is None:
            return None
        there = {host: frozenset(uuids) for host, uuids in gpus.items()}
        return energy_use(self.energy, self.series, there, stamped.hello.host, tokens or None)

    def open_commands(self) -> list[Command]:
        """Commands that are accepted and neither applied nor rejected yet."""
        return [record.command for record in self.commands.values() if record.ack.state == "accepted"]

    def pending_text(self) -> str:
        """Open commands for ranks, and what each of them waits for."""
        names: dict[str, list[str]] = {}
        for record in self.commands.values():
            if record.ack.state == "accepted" and record.command.name not in ("abort", "stacks"):
                names.setdefault(waits_for(record), []).append(record.command.name)
        return "; ".join(f"{', '.join(those)}: {what}" for what, those in names.items())

    def snapshot_messages(self) -> list[Any]:
        """The messages that give a late screen this state, in an order that `apply` understands."""
        messages: list[Any] = []
        if self.status:
            messages.append(self.status)
        for _, state in sorted(self.ranks.items()):
            if state.hello:
                messages.append(state.hello)
        messages += self.data.values()
        messages += self.series.messages()
        messages += self.evaluations.messages()
        for _, state in sorted(self.ranks.items()):
            messages += [m for m in (state.step, state.memory, state.heartbeat, state.goodbye) if m is not None]
            if state.spans and state.heartbeat:
                spans: Any = list(state.spans)
                messages.append(Phases(rank=state.rank, micro_steps=state.heartbeat.micro_steps, spans=spans))
        messages += self.waits.messages()
        messages += [
            Collectives(rank=rank.rank, step=rank.counted_step, records=[], counted=rank.counted)
            for rank in self.ranks.values()
            if rank.counted
        ]
        messages += self.energy.messages()
        messages += list(self.nodes.values())
        messages += [one for one in (self.verdict, self.time_report) if one is not None]
        messages += list(self.alerts.values())
        messages += list(self.commands.values())
        messages += list(self.events)
        return messages


def waits_for(record: CommandRecord) -> str:
    """What an accepted command waits for: what the ranks report once they have begun with it (a checkpoint is being
    written), before that a step boundary."""
    return record.ack.reason or _WAITS_FOR.get(record.command.name, "waiting for a step boundary")


def _is_event_packet(packet: Packet) -> bool:
    """A packet whose acks were all that it held is empty; telemetry always holds a heartbeat."""
    events = Hello | LogRecord | Event | CheckpointSaved | DataReport | Evaluation | Goodbye
    return not packet.messages or any(isinstance(message, events) for message in packet.messages)
