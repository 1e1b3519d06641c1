"""A stop that takes long: what its reason says meanwhile, and which rank is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from runtime.wire.messages import Command, Goodbye
from tests.harness.waiting import until_async
from tests.unit.diagnose.test_hang import PlayedHub, PlayedTaker
from tests.unit.state.test_stall import S, a_run, beat, stuck
from zerotop.diagnose.stacks import RankStacks
from zerotop.state.run import RunState
from zerotop.supervise.stopping import StopWatch, hindrance

IN_THE_WAY = "rank 1 (in backward 3/4) has not entered reduce 1532; ranks 0, 2 wait for it"


def stopping(place: Callable[[RunState], None]) -> RunState:
    run = a_run(state="stopping")
    place(run)
    return run


def silent(run: RunState) -> None:
    stuck(run, 0.0)
    run.hub_now_ns += 60 * S


def saving(run: RunState) -> None:
    stuck(run)
    beat(run, 2, 1532, 1531, 5, phase="checkpoint")


def compiling(run: RunState) -> None:
    stuck(run)
    beat(run, 1, 1531, 1531, 14, compiling=True)


def slow(run: RunState) -> None:
    for rank in range(3):
        beat(run, rank, 7, 6 + (rank != 1), 0.1)


def gone(run: RunState) -> None:
    for rank in range(3):
        beat(run, rank, 7, 7, 1)
        run.apply(Goodbye(rank=rank, outcome="stopped", step=10, wall_s=0))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (stuck, IN_THE_WAY),
        (silent, IN_THE_WAY),
        (saving, "rank 2 still writes the checkpoint"),
        (compiling, "no step boundary was reached; torch.compile compiles on rank 1"),
        (slow, "no step boundary was reached; rank 0 is in backward 3/4 of step 11"),
        (gone, "the ranks have ended their training"),
        (lambda run: None, "no rank has reported its position"),
    ],
    ids=["stuck", "silent", "saving", "compiling", "slow", "gone", "nothing known"],
)
def test_what_is_in_the_way_of_a_stop_is_told(place: Callable[[RunState], None], told: str) -> None:
    assert hindrance(stopping(place), {}) == told


def test_the_trouble_of_the_process_is_part_of_it() -> None:
    ranks = {1: RankStacks(1, 101, "stopped by a signal", (), "stopped by a signal")}
    assert hindrance(stopping(stuck), ranks).startswith("rank 1 (stopped by a signal, pid 101) has not entered")


def test_a_stop_without_a_deadline_says_after_a_while_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerotop.supervise.stopping.SLOW_S", 0.01)
    hub, aborted = PlayedHub(stopping(stuck)), list[str]()
    hub.set_status(state="stopping", reason="stop asked by me")

    async def play(command: Command) -> None:
        watch = StopWatch(hub, PlayedTaker(), aborted.append)  # type: ignore[arg-type]
        watch.begin(command)
        await until_async(lambda: hub.status.reason != "stop asked by me", "the reason")
        if "deadline_s" in command.arguments:
            await until_async(lambda: bool(aborted), "the abort")
        watch.close()

    asyncio.run(play(Command(id="s", name="stop", who="me")))
    assert hub.status.reason == f"stop asked by me; {IN_THE_WAY}" and aborted == []
    hub.set_status(reason="stop asked by me")
    asyncio.run(play(Command(id="t", name="stop", who="SIGTERM", arguments={"deadline_s": 0.3})))
    assert aborted == [
        f"the run did not stop within 0.3 s of SIGTERM: "
        f"{IN_THE_WAY.replace('backward 3/4', 'backward 3/4, pid 101')}; stacks: logs/1/stacks-1.txt"
    ]
