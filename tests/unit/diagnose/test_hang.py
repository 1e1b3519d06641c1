"""Hangs from played states: what counts as standing still, for how long, and what is said about it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from runtime.wire.base import Message
from runtime.wire.messages import Event, Goodbye, Heartbeat, Hello, RunStatus, StepResult
from zerotop.diagnose.frames import ThreadStack
from zerotop.diagnose.hang import HANG_S, HANG_VARIABLE, JUMP_S, HangWatch, Stillness, limit_s, should_move
from zerotop.diagnose.stacks import RankStacks
from zerotop.diagnose.stacks_report import Report
from zerotop.state.run import RunState

WORLD = 3


def a_run(steps: int = 10, step_ms: float = 400.0, state: str = "running", start: int = 0) -> RunState:
    run = RunState()
    run.hub_now_ns = 10**12
    run.apply(RunStatus.model_validate({"name": "q1", "state": state, "attempt": 1}))
    for rank in range(WORLD):
        run.apply(hello(rank, start), run.hub_now_ns)
        for step in range(start + 1, start + steps + 1):
            result = StepResult(rank=rank, step=step, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=step_ms, end_ns=0)
            run.apply(result, run.hub_now_ns)
        beat(run, rank)
    return run


def hello(rank: int, start: int = 0) -> Hello:
    return Hello(
        run="q1", attempt=1, rank=rank, local_rank=rank, world_size=WORLD, host="a", pid=100 + rank, boot_id="b",
        wall_s=0, mono_ns=0, device="cpu", config_digest="d", stage=2, precision="fp32", micro_batch=1,
        accumulation=4, global_batch=4, start_step=start,
    )  # fmt: skip


def beat(
    run: RunState,
    rank: int,
    entered: int = 8,
    progress_ns: int = 5,
    phase: str = "backward",
    compiling: bool = False,
) -> None:
    run.apply(
        Heartbeat.model_validate(
            {
                "rank": rank, "phase": phase, "phase_since_ns": 0, "step": 11, "micro_step": 3, "micro_steps": 4,
                "entered_seq": entered, "completed_seq": 7, "entered_op": "all_reduce", "progress_ns": progress_ns,
                "compiling": compiling, "now_ns": 6,
            }
        ),
        run.hub_now_ns,
    )  # fmt: skip


# ---- standing still --------------------------------------------------------------------------------------------------
def still(run: RunState, seconds: int, watch: Stillness | None = None, begin: int = 0) -> float | None:
    """What the last of looks once a second says."""
    watch = watch or Stillness()
    looks = [watch.look(run, float(begin + second)) for second in range(seconds + 1)]
    return looks[-1].still_s


def test_seconds_without_any_change_are_counted() -> None:
    assert still(a_run(), 61) == 61


@pytest.mark.parametrize("change", ["progress_ns", "entered", "phase"])
def test_one_rank_that_moves_is_enough(change: str) -> None:
    run, watch = a_run(), Stillness()
    assert still(run, 61, watch) == 61
    beat(run, 1, **{"progress_ns": {"progress_ns": 9}, "entered": {"entered": 9}, "phase": {"phase": "data"}}[change])  # type: ignore[arg-type]
    look = watch.look(run, 62)
    assert look.moved and look.still_s == 0


def test_heartbeats_that_say_the_same_again_are_no_movement() -> None:
    run, watch = a_run(), Stillness()
    still(run, 30, watch)
    for rank in (0, 2):
        beat(run, rank)
    assert watch.look(run, 31).still_s == 31


def test_a_jump_of_our_own_clock_starts_the_count_anew() -> None:
    run, watch = a_run(), Stillness()
    assert still(run, 50, watch) == 50
    assert watch.look(run, 50 + JUMP_S + 0.1).still_s == 0
    assert still(run, 10, watch, begin=56) == pytest.approx(10.9)


@pytest.mark.parametrize("state", ["starting", "paused", "restarting", "stopping", "finished", "failed"])
def test_only_a_running_run_hangs(state: str) -> None:
    assert still(a_run(state=state), 100) is None


@pytest.mark.parametrize("phase", ["checkpoint", "paused", "eval", "init"])
def test_a_rank_with_a_good_reason_excuses_all(phase: str) -> None:
    run = a_run()
    beat(run, 1, phase=phase)
    assert still(run, 100) is None


def test_a_rank_that_compiles_excuses_all_until_it_has_compiled() -> None:
    run, watch = a_run(steps=500), Stillness()
    beat(run, 1, compiling=True)
    assert still(run, 600, watch) is None
    beat(run, 1, progress_ns=9)
    assert still(run, 20, watch, begin=601) == 20


def test_a_rank_that_is_not_heard_from_has_no_reason() -> None:
    """Stopped while the others wait for it inside a checkpoint."""
    run = a_run()
    beat(run, 0, phase="checkpoint")
    run.hub_now_ns += 60 * 10**9
    for rank in (0, 1):
        beat(run, rank, phase="checkpoint")
    assert still(run, 100) == 100


@pytest.mark.parametrize(("steps", "moves"), [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("start", [0, 50])
def test_the_first_two_steps_of_an_attempt_take_as_long_as_they_like(steps: int, moves: bool, start: int) -> None:
    assert should_move(a_run(steps=steps, start=start)) is moves


def test_the_count_begins_when_the_reason_ends() -> None:
    run, watch = a_run(state="paused"), Stillness()
    still(run, 500, watch)
    run.apply(RunStatus(name="q1", state="running", attempt=1))
    assert watch.look(run, 501).still_s == 1  # since the last look that saw the reason
    assert still(run, 20, watch, begin=502) == 22


def test_slow_steps_stretch_the_limit_and_one_of_them_does_not() -> None:
    assert limit_s(a_run(step_ms=400)) == HANG_S == 60
    assert limit_s(a_run(step_ms=9000)) == 90
    mixed = a_run(steps=9, step_ms=400)
    mixed.apply(StepResult(rank=0, step=10, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=1e6, end_ns=0))
    assert limit_s(mixed) == 60


def test_steps_of_earlier_attempts_do_not_count_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(steps=40, step_ms=20_000)
    for rank in range(WORLD):
        run.apply(hello(rank, start=40).model_copy(update={"attempt": 2}), run.hub_now_ns)
        for step in (41, 42):
            run.apply(StepResult(rank=rank, step=step, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=7000.0, end_ns=0))
    assert limit_s(run) == 70
    monkeypatch.setenv(HANG_VARIABLE, "100")
    assert limit_s(run) == 100


# ---- what is said about it -------------------------------------------------------------------------------------------
class PlayedHub:
    def __init__(self, state: RunState) -> None:
        self.state = state
        self.events: list[Event] = []
        self.said: list[Message] = []

    def say(self, *messages: Message) -> None:
        self.said += messages
        self.state.apply_all(messages, 0)

    @property
    def status(self) -> RunStatus:
        assert self.state.status is not None
        return self.state.status

    def set_status(self, **changes: Any) -> None:
        self.state.apply(self.status.model_copy(update=changes))

    def event(self, what: str, text: str, severity: str = "info", **data: Any) -> None:
        self.events.append(
            Event.model_validate(
                {"rank": None, "what": what, "text": text, "severity": severity, "data": data, "wall_s": 0}
            )
        )


class PlayedTaker:
    """Finds what it is told; `meanwhile` happens while the ranks are asked."""

    def __init__(self) -> None:
        self.found = {rank: RankStacks(rank, 100 + rank, "sleeping", stack("train.py")) for rank in range(WORLD)}
        self.looks = 0
        self.reports: list[str] = []
        self.collected: list[bool] = []
        self.deepened = 0
        self.meanwhile = lambda: None

    async def look(self) -> Mapping[int, RankStacks]:
        self.looks += 1
        self.meanwhile()
        return self.found

    async def report(self, ranks: Mapping[int, RankStacks], verdict: str, *, evidence: bool = False) -> Report:
        self.collected.append(evidence)
        self.reports.append(verdict)
        return Report(ranks, verdict, "", f"logs/1/stacks-{len(self.reports)}.txt")

    async def deepen(self, report: Report) -> Report:
        self.deepened += 1
        return report


def stack(file: str) -> tuple[ThreadStack, ...]:
    return (ThreadStack(True, (f'  File "/x/{file}", line 1 in f',)),)


class Play:
    """A hang watch that looks once a second of a clock of our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: RunState) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("zerotop.diagnose.hang.time.monotonic", lambda: self.now_s)
        self.run, self.hub, self.taker, self.ended = run, PlayedHub(run), PlayedTaker(), list[str]()
        self.watch = HangWatch(self.hub, self.taker, self.ended.append)  # type: ignore[arg-type]

    def go(self, seconds: int) -> list[tuple[str, str]]:
        """(what, severity) of the events in that time."""
        known = len(self.hub.events)
        for _ in range(seconds):
            self.now_s += 1
            asyncio.run(self.watch.look(self.now_s))
        return [(event.what, event.severity) for event in self.hub.events[known:]]


def stuck_on_rank_1() -> RunState:
    run = a_run()
    beat(run, 1, entered=7)
    return run


def test_a_hang_is_told_once_and_cleared_when_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, stuck_on_rank_1())
    play.taker.found[1] = RankStacks(1, 101, "stopped by a signal", (), "stopped by a signal")
    assert play.go(60) == []
    assert play.go(60) == [("hang", "error")]
    line = (
        "rank 1 (stopped by a signal, pid 101) has not entered all_reduce 8; ranks 0, 2 wait for it; "
        "stacks: logs/1/stacks-1.txt"
    )
    assert play.hub.events[0].text == line
    assert play.hub.status.reason == f"hang: {line}"
    assert play.ended == [f"no progress for 1m 00s: {line}"]
    beat(play.run, 1, entered=8)
    assert play.go(1) == [("hang", "info")] and play.hub.status.reason == ""
    assert play.hub.events[1].text == "progress resumed at step 11, after 2m 00s without progress"
    assert play.go(59) == [] and play.go(2) == [("hang", "error")]  # the next one counts from its own beginning


def test_ranks_that_wait_for_one_that_has_finished_are_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run()
    for rank in (0, 2):
        beat(run, rank, entered=8)
    run.apply(Goodbye(rank=1, outcome="finished", step=10, wall_s=0))
    play = Play(monkeypatch, run)
    play.watch = HangWatch(play.hub, play.taker, None, play.ended.append)  # type: ignore[arg-type]
    assert play.go(62) == [("hang", "error")]
    told = "rank 1 ended after step 10 while the others went on: its data is shorter, or its loop takes fewer steps"
    assert play.ended == [told]
    verdict = "rank 1 ended after step 10, ranks 0, 2 wait in collective 8 (all_reduce)"
    assert play.hub.events[0].text.startswith(verdict)


def test_compiling_is_no_hang_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, stuck_on_rank_1())
    play.taker.found[1] = RankStacks(1, 101, "running", stack("torch/_inductor/compile_fx.py"))
    assert play.go(65) == [("compiling", "info")]
    assert play.hub.events[0].text == "no progress for 1m 00s, but not a hang: rank 1 compiles"
    assert play.go(65) == [] and play.taker.looks == 2
    assert play.hub.status.reason == "" and play.taker.reports == [] and play.ended == []
    play.taker.found[1] = RankStacks(1, 101, "sleeping", stack("train.py"))
    assert play.go(65) == [("hang", "error")]


def test_what_moves_while_the_stacks_are_taken_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, stuck_on_rank_1())
    play.taker.meanwhile = lambda: beat(play.run, 1, entered=8)
    assert play.go(62) == [] and play.taker.looks == 1


def test_the_reason_of_a_stop_that_comes_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, stuck_on_rank_1())
    assert play.go(62) == [("hang", "error")]
    play.hub.set_status(state="stopping", reason="stop asked by me")
    assert play.go(100) == [] and play.hub.status.reason == "stop asked by me"


def test_a_restart_is_not_told_as_the_hang_s_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, stuck_on_rank_1())
    assert play.go(62) == [("hang", "error")]
    play.hub.set_status(attempt=2, reason="")  # and running again before the next look
    for rank in range(WORLD):
        play.run.apply(hello(rank).model_copy(update={"attempt": 2}), play.run.hub_now_ns)
        for step in (1, 2):
            play.run.apply(StepResult(rank=rank, step=step, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=400.0, end_ns=0))
        beat(play.run, rank)
    assert play.go(1) == [] and play.hub.status.reason == ""
    assert play.go(62) == [("hang", "error")]


def test_ranks_in_a_collective_that_does_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(monkeypatch, a_run())
    play.taker.found[2] = RankStacks(2, 102, "in the kernel", (), "in the kernel: nvidia_ioctl")
    play.go(62)
    assert play.hub.events[0].text == (
        "all ranks have entered collective 8 (all_reduce), it does not complete; "
        "rank 2: in the kernel: nvidia_ioctl (pid 102); stacks: logs/1/stacks-1.txt"
    )
