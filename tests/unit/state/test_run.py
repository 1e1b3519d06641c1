"""RunState and what it is made of: series, waits, memory, progress, still pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.wire.messages import (
    Ack,
    Collectives,
    Command,
    CommandRecord,
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
from runtime.wire.node import GpuStats, NodeStats
from zerotop.state.frozen_view import freeze
from zerotop.state.memory import gpu_of, memory_use
from zerotop.state.progress import progress, steps_at_risk
from zerotop.state.run import COMMANDS_KEPT, EVENTS_KEPT, RunState
from zerotop.state.series import Series
from zerotop.state.waits import OPEN_KEPT, Waits


def result(step: int, rank: int = 0, step_ms: float = 100.0, loss: float | None = 2.0) -> StepResult:
    return StepResult(
        rank=rank, step=step, loss=loss, lr=1e-3, grad_norm=1.0, step_ms=step_ms, tokens_per_s=50.0, end_ns=step
    )


def hello(rank: int = 0, attempt: int = 1, **more: object) -> Hello:
    fields = {
        "run": "q1",
        "attempt": attempt,
        "rank": rank,
        "local_rank": rank,
        "world_size": 2,
        "host": "a",
        "pid": 1,
        "boot_id": "b",
        "wall_s": 0,
        "mono_ns": 0,
        "device": "cpu",
        "config_digest": "d",
        "stage": 2,
        "precision": "bf16",
        "micro_batch": 1,
        "accumulation": 4,
        "global_batch": 8,
        "steps": 100,
        **more,
    }
    return Hello.model_validate(fields)


def beat(rank: int = 0, phase: str = "forward") -> Heartbeat:
    return Heartbeat(
        rank=rank,
        phase=phase,
        phase_since_ns=0,
        step=1,
        micro_step=1,
        micro_steps=4,
        entered_seq=0,
        completed_seq=0,
        progress_ns=0,
        now_ns=0,
    )


# ---- folding -------------------------------------------------------------------------------------------------------
def test_a_late_screen_is_where_the_early_one_is() -> None:
    early = RunState()
    early.apply(RunStatus(name="q1", state="running", last_checkpoint_step=5))
    for rank in range(2):
        early.apply(hello(rank), 10)
        early.apply(beat(rank), 11)
        early.apply(Phases(rank=rank, micro_steps=4, spans=[("forward", 1, 1, 0, 5), ("backward", 1, 1, 5, 9)]), 11)
        early.apply(Memory(rank=rank, ledger={"parameters": 7}, rss_bytes=9, host_total_bytes=99, at_ns=1), 12)
        for step in range(1, 8):
            early.apply(result(step, rank), 13)
            early.apply(
                Collectives(
                    rank=rank, step=step, records=[(step, "reduce", 8, 0, 0, 500 + 900 * rank, 500 + 900 * rank)]
                ),
                13,
            )
    early.apply(Event(rank=None, what="checkpoint", text="at step 5", wall_s=1))
    early.apply(LogRecord(rank=1, level="warning", logger="x", text="hm", wall_s=2))
    command = Command(id="c", name="pause", number=1)
    early.apply(CommandRecord(command=command, ack=Ack(id="c", state="applied", step=7)))

    late = RunState()
    heard = {rank: state.heard_ns for rank, state in early.ranks.items()}
    late.apply_snapshot(Snapshot(hub_seq=40, now_ns=20, wall_s=0, heard_ns=heard, messages=early.snapshot_messages()))
    assert {rank: state.heard_ns for rank, state in late.ranks.items()} == {0: 13, 1: 13}  # not the snapshot's own time
    assert (late.step, late.loss, late.state_name, late.world_size) == (7, 2.0, "running", 2)
    assert [p.step for p in late.series] == [p.step for p in early.series]
    assert list(late.events) == list(early.events) and late.commands == early.commands
    assert {r: s.phase for r, s in late.ranks.items()} == {0: "forward", 1: "forward"}
    assert list(late.ranks[1].spans) == list(early.ranks[1].spans)
    assert late.ranks[0].memory == early.ranks[0].memory
    assert late.waits.meetings[-1] == early.waits.meetings[-1]
    assert late.snapshot_messages() == early.snapshot_messages()


def test_packets_that_the_snapshot_held_are_not_applied_twice() -> None:
    run = RunState()
    run.apply_snapshot(Snapshot(hub_seq=5, now_ns=1, wall_s=0, messages=[]))
    event = Event(rank=0, what="x", text="", wall_s=0)
    old = Packet(source="rank/0", attempt=1, seq=3, sent_ns=0, arrival_ns=2, hub_seq=5, messages=[event])
    assert run.apply_packet(old) is False and not run.events
    assert run.apply_packet(old.model_copy(update={"hub_seq": 6, "arrival_ns": 9})) is True
    assert len(run.events) == 1 and run.hub_now_ns == 9 and run.ranks[0].heard_ns == 9


def test_gaps_in_a_ranks_numbers_are_counted_per_channel() -> None:
    run = RunState()
    for seq in (1, 2, 5):
        run.apply_packet(Packet(source="rank/0", attempt=1, seq=seq, sent_ns=0, messages=[beat()]))
    run.apply_packet(
        Packet(source="rank/0", attempt=1, seq=1, sent_ns=0, messages=[Event(rank=0, what="x", text="", wall_s=0)])
    )
    assert run.ranks[0].packets_lost == 2
    run.apply_packet(Packet(source="rank/0", attempt=2, seq=1, sent_ns=0, messages=[beat()]))
    assert run.ranks[0].packets_lost == 2


def test_nothing_of_a_dead_attempt_shines_through() -> None:
    run = RunState()
    run.apply(hello(0))
    run.apply(beat(0, "backward"))
    run.apply(Memory(rank=0, ledger={}, rss_bytes=1, host_total_bytes=2, at_ns=0))
    run.apply(Collectives(rank=0, step=1, records=[(1, "reduce", 1, 0, 0, 1, 0)]))
    run.apply(hello(0, attempt=2))
    assert run.ranks[0].phase == "init" and run.ranks[0].memory is None
    assert run.waits.messages() == []


def test_commands_live_from_accepted_to_applied_and_old_ones_go() -> None:
    run = RunState()
    run.apply(Ack(id="0", state="applied"))  # of an old recording, which has its record as well
    assert run.commands == {}
    for number in range(COMMANDS_KEPT + 5):
        command = Command(id=str(number), name="checkpoint", number=number + 1)
        run.apply(CommandRecord(command=command, ack=Ack(id=str(number), state="accepted")))
    assert len(run.commands) == COMMANDS_KEPT and "0" not in run.commands
    assert run.pending_text().endswith("waiting for a step boundary")
    for key, record in list(run.commands.items()):
        run.apply(CommandRecord(command=record.command, ack=Ack(id=key, state="applied", step=3)))
    assert run.open_commands() == [] and run.pending_text() == ""


def test_events_are_bounded() -> None:
    run = RunState()
    for number in range(EVENTS_KEPT + 10):
        run.apply(Event(rank=0, what=str(number), text="", wall_s=0))
    assert len(run.events) == EVENTS_KEPT and run.events[-1].what == str(EVENTS_KEPT + 9)  # type: ignore[union-attr]


def test_the_step_of_a_run_is_what_every_rank_has_finished() -> None:
    run = RunState()
    run.apply(hello(0, start_step=40))
    assert run.step == 40
    run.apply(result(43, 0))
    run.apply(result(42, 1))
    assert run.step == 42


# ---- waits ---------------------------------------------------------------------------------------------------------
def test_collectives_that_are_never_complete_do_not_pile_up() -> None:
    waits = Waits()
    for seq in range(1, 2000):
        waits.add(Collectives(rank=0, step=1, records=[(seq, "reduce", 1, 0, 0, 5, 0)]), 2)
    assert len(waits._open) == OPEN_KEPT and not waits.meetings


def test_overlapped_waiting_costs_what_the_training_thread_was_blocked_for() -> None:
    """Rank 1 comes 30 ms late to a collective that nobody waits for; the others need its result 10 ms after that, in
    another one."""
    waits = Waits()
    for step in (1, 2):
        for rank in range(3):
            late = rank == 1
            records = [(2 * step - 1, "reduce", 64, 0, 0, 1_000 if late else 31_000, 0)]
            records.append((2 * step, "reduce", 64, 0, 0, 1_000, 1_000 if late else 10_000))
            waits.add(Collectives(rank=rank, step=step, records=records), 3)
    window = waits.window()
    assert window.waited_ms == {0: 10.0, 1: 0.0, 2: 10.0} and window.caused_ms[1] == 10.0
    assert waits.net_cost_ms()[1] == [10.0]
    assert waits.meetings[0].waited_us == {0: 30_000, 1: 0, 2: 30_000}  # as the table of collectives has it
    waits.add(Collectives(rank=0, step=1, records=[(9, "reduce", 64, 0, 0, 21_000, 21_000)]), 3)
    for rank in (1, 2):
        waits.add(Collectives(rank=rank, step=1, records=[(9, "reduce", 64, 0, 0, 1_000, 1_000)]), 3)
    assert waits.net_cost_ms()[1] != [10.0]  # what comes late counts


def test_waiting_is_what_is_beyond_the_shortest_duration() -> None:
    waits = Waits()
    for rank, duration in ((0, 5_000), (1, 1_000), (2, 4_000)):
        waits.add(Collectives(rank=rank, step=3, records=[(1, "reduce", 64, 0, 0, duration, duration)]), 3)
    meeting = waits.meetings[0]
    assert (meeting.last_rank, meeting.transfer_us, meeting.skew_us) == (1, 1_000, 4_000)
    assert waits.window().steps == 0  # the newest step is still being reported
    for rank, duration in ((0, 1_000), (1, 1_100), (2, 1_050)):
        waits.add(Collectives(rank=rank, step=4, records=[(2, "reduce", 64, 0, 0, duration, duration)]), 3)
    window = waits.window()
    assert window.came_last == {1: 1} and window.caused_ms == {1: 3.5}
    assert window.waited_ms == {0: 4.0, 1: 0.0, 2: 3.0}


# ---- memory --------------------------------------------------------------------------------------------------------
def test_gpu_memory_is_split_into_counted_and_derived_parts_that_add_up() -> None:
    use = memory_use(
        Memory(
            rank=0,
            ledger={"parameters": 100, "optimizer": 50},
            pinned_bytes=7,
            rss_bytes=1,
            allocated_bytes=180,
            reserved_bytes=200,
            device_used_bytes=230,
            device_total_bytes=1000,
            host_total_bytes=1,
            at_ns=0,
        )
    )
    assert dict(use.parts) == {"parameters": 100, "optimizer": 50, "activations": 30, "cache": 20, "other": 30}
    assert sum(count for _, count in use.parts) == use.used_bytes == 230
    assert (use.total_bytes, use.on_gpu, use.pinned_bytes) == (1000, True, 7)


def test_cpu_memory_is_the_ledger_and_the_rest_of_the_process() -> None:
    use = memory_use(Memory(rank=0, ledger={"parameters": 100}, rss_bytes=400, host_total_bytes=1000, at_ns=0))
    assert dict(use.parts) == {"parameters": 100, "other": 300} and use.used_bytes == 400 and not use.on_gpu


def test_a_ranks_gpu_is_found_by_its_uuid_alone() -> None:
    run = RunState()
    run.apply(hello(0, device_uuid="GPU-b"))
    run.apply(hello(1))
    gpus = [GpuStats(index=0, uuid="GPU-a", name="x"), GpuStats(index=1, uuid="GPU-b", name="y")]
    run.apply(
        NodeStats(
            host="a",
            cpu_percent=0,
            cpu_count=1,
            load_1m=0,
            ram_used_bytes=0,
            ram_total_bytes=1,
            gpus=gpus,
            at_ns=0,
            wall_s=0,
        )
    )
    found = gpu_of(run, run.ranks[0])
    assert found is not None and found.index == 1
    assert gpu_of(run, run.ranks[1]) is None


# ---- progress ------------------------------------------------------------------------------------------------------
def test_one_slow_step_does_not_move_the_eta() -> None:
    run = RunState()
    run.apply(RunStatus(name="q1", state="running", last_checkpoint_step=15))
    run.apply(hello(0))
    for step in range(1, 21):
        run.apply(result(step, step_ms=60_000 if step == 18 else 500))
    done = progress(run)
    assert done.step_ms == 500 and done.eta_s == pytest.approx(40) and done.share == pytest.approx(0.2)
    assert steps_at_risk(run) == 5
    run.apply(RunStatus(name="q1", state="paused"))
    assert progress(run).eta_s is None and steps_at_risk(run) == 20


def test_a_script_that_goes_on_beyond_the_configs_steps_has_no_end() -> None:
    run = RunState()
    run.apply(RunStatus(name="q1", state="running"))
    run.apply(hello(0, steps=10))
    for step in (10, 11):
        run.apply(result(step))
        done = progress(run)
        assert (done.steps, done.share, done.eta_s) == ((10, 1.0, 0.0) if step == 10 else (None, None, None))


def test_an_unknown_length_has_no_share_and_no_eta() -> None:
    run = RunState()
    run.apply(RunStatus(name="q1", state="running"))
    run.apply(hello(0, steps=None))
    run.apply(result(3))
    assert progress(run).share is None and progress(run).eta_s is None


# ---- still pictures ------------------------------------------------------------------------------------------------
def test_a_still_picture_does_not_move_with_the_run() -> None:
    run = RunState()
    run.apply(hello(0))
    run.apply(hello(1))
    for step in range(1, 6):
        for rank in (0, 1):
            run.apply(result(step, rank))
            run.apply(
                Collectives(
                    rank=rank, step=step, records=[(step, "reduce", 1, 0, 0, 500 + 900 * rank, 500 + 900 * rank)]
                )
            )
    run.apply(beat(0))
    still = freeze(run)
    before = still.snapshot_messages()
    meetings = list(still.waits.meetings)
    for rank in (0, 1):
        run.apply(result(6, rank, loss=math.nan))
        run.apply(Collectives(rank=rank, step=6, records=[(6, "reduce", 1, 0, 0, 500, 0)]))
        run.apply(beat(rank, "paused"))
        run.apply(Phases(rank=rank, micro_steps=4, spans=[("forward", 6, 1, 0, 1)]))
    run.apply(Event(rank=0, what="x", text="", wall_s=0))
    assert still.snapshot_messages() == before and list(still.waits.meetings) == meetings
    assert still.step == 5 and run.step == 6


# ---- restarts --------------------------------------------------------------------------------------------------------
def restarted() -> RunState:
    """Two ranks were at step 25 when the supervisor began attempt 2."""
    state = RunState()
    state.apply(RunStatus(name="q1", state="running", attempt=1, step=25))
    for rank in (0, 1):
        state.apply(hello(rank))
        state.apply(beat(rank))
    for step in range(1, 26):
        state.apply(result(step))
        state.apply(result(step, rank=1))
    state.apply(RunStatus(name="q1", state="restarting", attempt=2, step=25))
    return state


def test_a_new_attempt_forgets_the_dead_ranks_and_keeps_the_curve() -> None:
    state = restarted()
    assert state.ranks == {} and state.step == 25 and state.hello is None
    assert [point.step for point in state.series] == list(range(1, 26))
    state.apply(RunStatus(name="q1", state="restarting", attempt=2, step=25))
    state.apply(hello(1, attempt=2, start_step=20))
    assert [point.step for point in state.series] == list(range(1, 21)) and state.step == 20
    state.apply(result(21, rank=1))
    state.apply(hello(0, attempt=2, start_step=20))  # late: the curve has gone on
    state.apply(result(21))
    state.apply(result(22))
    assert [point.step for point in state.series] == list(range(1, 23))
    assert state.ranks[1].step is not None  # the late hello of rank 0 took nothing from rank 1


def test_steps_that_come_before_the_hello_are_not_cut_away() -> None:
    state = restarted()
    state.apply(result(21))
    state.apply(result(22))
    state.apply(hello(0, attempt=2, start_step=20))
    assert [point.step for point in state.series] == list(range(1, 23))


def test_a_series_can_be_cut_to_nothing_and_begun_again() -> None:
    series = Series()
    for step in range(1, 6):
        series.add(result(step))
    series.cut(0)
    assert list(series) == []
    series.add(result(1))
    assert [point.step for point in series] == [1]


def test_a_screen_that_comes_while_the_ranks_start_again_sees_no_step_of_theirs() -> None:
    state, late = restarted(), RunState()
    late.apply_snapshot(Snapshot(hub_seq=1, now_ns=1, wall_s=1, messages=state.snapshot_messages()))
    assert late.step == 25 and all(rank.step is None for rank in late.ranks.values())
    state.apply(hello(0, attempt=2, start_step=20))
    late.apply_snapshot(Snapshot(hub_seq=2, now_ns=1, wall_s=1, messages=state.snapshot_messages()))
    assert late.step == state.step == 20 and late.ranks[0].step is None


class Unsorted(dict[int, Any]):
    """Counts how often somebody looks through all ranks."""

    looks = 0

    def __iter__(self) -> Iterator[int]:
        self.looks += 1
        return super().__iter__()

    def items(self) -> Any:
        self.looks += 1
        return super().items()

    def values(self) -> Any:
        self.looks += 1
        return super().values()


def test_the_cost_of_a_message_does_not_grow_with_the_number_of_ranks() -> None:
    run = RunState()
    run.ranks = ranks = Unsorted()
    for rank in (3, 1, 0, 2):
        run.apply(hello(rank, world_size=4))
    ranks.looks = 0
    for rank in range(4):
        run.apply(Collectives(rank=rank, step=1, records=[(1, "all_reduce", 8, 1, 2, 10, 5)]))
        run.apply(beat(rank))
        run.apply(result(1, rank))
    assert ranks.looks == 0
    assert len(run.waits.meetings) == 1 and run.hello == ranks[0].hello


def test_the_lowest_rank_speaks_for_the_run_whoever_comes_and_goes() -> None:
    run = RunState()
    assert run.hello is None and run.world_size == 0
    for rank, lowest in ((2, 2), (1, 1), (3, 1)):
        run.apply(hello(rank))
        assert run.hello is not None and run.hello.rank == lowest
    still = freeze(run)
    run.apply(RunStatus(name="q1", state="running", attempt=1))
    run.apply(RunStatus(name="q1", state="restarting", attempt=2))
    assert run.hello is None
    run.apply(hello(3, attempt=2))
    assert run.hello == hello(3, attempt=2) and still.hello == hello(1)


def test_a_number_that_is_no_gap_is_no_loss() -> None:
    run = RunState()
    for seq in (1, 10**15, 2, 5):
        run.apply_packet(Packet(source="rank/0", attempt=1, seq=seq, sent_ns=0, hub_seq=0, messages=[beat()]))
    assert run.ranks[0].packets_lost == 2
    run.apply_packet(Packet(source="rank/²", attempt=1, seq=1, sent_ns=0, messages=[]))
    assert run.ranks.keys() == {0}


def test_a_revision_changes_with_messages_of_its_kinds_and_with_no_other() -> None:
    state = RunState()
    state.apply(result(1))
    steps, events = state.revision(("step",)), state.revision(("event", "log"))
    state.apply(LogRecord(rank=0, level="info", logger="x", text="t", wall_s=0))
    assert state.revision(("step",)) == steps and state.revision(("event", "log")) != events
    still = freeze(state)
    state.apply(result(2))
    assert still.revision(("step",)) == steps != state.revision(("step",))
    other = RunState()
    other.apply(result(1))
    assert other.revision(("step",)) != steps  # a new snapshot is another state


def test_a_rank_that_has_left_and_introduces_itself_again_is_there() -> None:
    """A process that trains a second time, after its first training has ended."""
    state = RunState()
    state.apply(hello(0))
    state.apply(Goodbye(rank=0, outcome="finished", step=9, wall_s=0))
    assert state.ranks[0].phase == "finished"
    state.apply(hello(0))
    assert state.ranks[0].goodbye is None and state.ranks[0].phase != "finished"
