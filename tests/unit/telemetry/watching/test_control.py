"""Commands in a trainer that is not ours: at one step of all ranks, or refused with the reason."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.telemetry import Inbox, NullTelemetry
from runtime.telemetry.watching.control import AHEAD, Agreement, CheckpointFailed, Controls, WatcherControl
from runtime.telemetry.watching.introduction import Introduction, Place, Trainer
from runtime.wire.messages import Ack, Command
from tests.harness.waiting import until


class Link(NullTelemetry):
    """A rank's telemetry that keeps its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox = Inbox()
        self.acks: list[Ack] = []
        self.entered: list[str] = []
        self.saved: list[tuple[int, str]] = []
        self.events: list[str] = []

    def checkpoint_saved(self, step: int, path: str, **_given: Any) -> None:
        self.saved.append((step, path))

    def event(self, what: str, text: str, **_given: Any) -> None:
        self.events.append(text)

    def ack(self, ack: Ack) -> None:
        self.acks.append(ack)

    def enter(self, phase: Any, step: int | None = None, micro_step: int | None = None) -> None:
        self.entered.append(phase)

    @property
    def answers(self) -> list[tuple[str, str]]:
        return [(ack.id, ack.state) for ack in self.acks]


class Rank:
    def __init__(self, folder: Path, rank: int, world_size: int, controls: Controls) -> None:
        self.link = Link()
        self.control = WatcherControl(self.link, rank, Agreement(folder, 1, world_size), controls)
        self.control.attach()

    def give(self, number: int, name: str, **arguments: object) -> None:
        self.link.inbox.put(Command(id=f"{name}-{number}", name=name, number=number, arguments=dict(arguments)))


def test_one_rank_obeys_at_once(tmp_path: Path) -> None:
    saved = []
    rank = Rank(tmp_path, 0, 1, Controls(save=lambda: saved.append(1) or "/out"))
    rank.give(1, "checkpoint")
    rank.control.at_boundary(5)
    assert saved == [1]
    assert rank.link.answers == [("checkpoint-1", "accepted"), ("checkpoint-1", "applied")]
    assert rank.link.acks[-1].step == 5 and rank.link.acks[-1].result == {"path": "/out", "step": 5}


def test_ranks_obey_at_the_same_step(tmp_path: Path) -> None:
    """Rank 1 gets the command later than rank 0, and both act at the end of the same step."""
    acted: list[tuple[int, int]] = []
    steps = [0, 0]

    def saver(rank: int) -> Controls:
        return Controls(save=lambda: acted.append((rank, steps[rank])) or "/out")

    ranks = [Rank(tmp_path, number, 2, saver(number)) for number in range(2)]
    ranks[0].give(1, "checkpoint")
    for step in range(1, 6):
        if step == 2:
            ranks[1].give(1, "checkpoint")
        for number, rank in enumerate(ranks):
            steps[number] = step
            rank.control.at_boundary(step)
    assert acted == [(0, 1 + AHEAD), (1, 1 + AHEAD)]
    assert ranks[0].link.answers[-1] == ("checkpoint-1", "applied")
    assert ranks[1].link.acks == []  # one answer per command


def test_a_rank_that_finds_the_note_late_acts_at_once(tmp_path: Path) -> None:
    acted: list[int] = []
    ranks = [Rank(tmp_path, 0, 2, Controls()), Rank(tmp_path, 1, 2, Controls(save=lambda: acted.append(9) or "/out"))]
    for rank in ranks:
        rank.give(1, "checkpoint")
    ranks[0].control.at_boundary(1)
    ranks[1].control.at_boundary(9)
    assert acted == [9]


def test_a_pause_lasts_until_resume(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Controls(save=lambda: "/out"))
    rank.give(1, "pause")
    thread = threading.Thread(target=rank.control.at_boundary, args=(3,))
    thread.start()
    until(lambda: ("pause-1", "applied") in rank.link.answers, "the pause")
    assert thread.is_alive()
    rank.give(2, "checkpoint")  # a paused run still saves
    until(lambda: ("checkpoint-2", "applied") in rank.link.answers, "the checkpoint")
    rank.give(3, "resume")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert rank.link.answers[-1] == ("resume-3", "applied")
    assert rank.link.entered[0] == "paused"


def test_what_a_trainer_cannot_do_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Controls(reasons={"checkpoint": "give watch() a function that saves"}))
    for number, name in enumerate(("checkpoint", "stop", "profile", "memory-snapshot"), 1):
        rank.give(number, name)
    rank.control.at_boundary(1)
    assert [state for _, state in rank.link.answers] == ["rejected"] * 4
    assert rank.link.acks[0].reason == "not possible with this trainer: give watch() a function that saves"


def test_the_log_interval_is_set_where_a_trainer_has_one(tmp_path: Path) -> None:
    intervals: list[int] = []
    controls = (Controls(), Controls(log_interval=10, set_log_interval=intervals.append))
    plain, logs = (Rank(tmp_path, 0, 1, one) for one in controls)
    for rank in (plain, logs):
        rank.give(1, "set", log_interval=7)
        rank.control.at_boundary(1)
    reason = "log_interval is not possible with this trainer; lr_factor, telemetry_hz, log_level are"
    assert [(ack.state, ack.reason) for ack in plain.link.acks] == [("rejected", reason)]
    assert [ack.state for ack in logs.link.acks] == ["applied"] and intervals == [7]
    hellos = [Introduction(Place(), Trainer("t", controls=one), None).hello() for one in controls]
    assert "log_interval" not in hellos[0].knobs and hellos[1].knobs["log_interval"] == 7


def test_a_save_that_fails_is_rejected_and_the_next_one_may_work(tmp_path: Path) -> None:
    problems = ["the disk is full"]

    def save() -> str:
        if problems:
            raise CheckpointFailed(problems.pop())
        return "/out"

    rank = Rank(tmp_path, 0, 1, Controls(save=save))
    rank.give(1, "checkpoint")
    rank.control.at_boundary(1)
    rank.give(2, "checkpoint")
    rank.control.at_boundary(2)
    assert rank.link.acks[1].reason == "the disk is full"
    assert rank.link.answers[-1] == ("checkpoint-2", "applied")


def test_a_trainer_that_saves_later_answers_then(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Controls(save=lambda: None))
    rank.give(1, "checkpoint")
    rank.control.at_boundary(1)
    assert rank.link.answers == [("checkpoint-1", "accepted")]
    rank.control.saved("/out/1", 1)
    rank.control.saved("/out/2", 2)  # one that nobody asked for
    assert rank.link.answers == [("checkpoint-1", "accepted"), ("checkpoint-1", "applied")]


def test_the_learning_rate_is_changed_for_the_step_alone(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    rank = Rank(tmp_path, 0, 1, Controls(optimizers=[optimizer]))
    rank.give(1, "set", lr_factor=0.25)
    rank.control.at_boundary(0)
    for expected in (-0.25, -0.25 - 0.125):
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        assert parameter.item() == expected
    assert optimizer.param_groups[0]["lr"] == 0.25  # what the schedule says: 1 x 0.5 x 0.5
    rank.control.close()
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.375 - 0.25)


def test_a_setting_of_our_engine_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Controls())
    rank.give(1, "set", checkpoints_kept=3)
    rank.give(2, "set", lr_factor=2.0)
    rank.give(3, "set", log_level="debug")
    rank.control.at_boundary(1)
    assert [ack.state for ack in rank.link.acks] == ["rejected", "rejected", "applied"]
    assert "lr_factor, telemetry_hz, log_level are" in rank.link.acks[0].reason
    assert "no optimizer" in rank.link.acks[1].reason


def test_a_stop_saves_first_where_the_trainer_does_not_itself(tmp_path: Path) -> None:
    done: list[str] = []

    def save() -> str:
        done.append("save")
        return "/out/5"

    for saves_itself, expected in ((False, ["save", "stop"]), (True, ["stop"])):
        done.clear()
        controls = Controls(save=save, stop=lambda: done.append("stop"), stop_saves=saves_itself)
        rank = Rank(tmp_path, 0, 1, controls)
        rank.give(1, "stop")
        rank.control.at_boundary(5)
        assert done == expected
        assert rank.link.saved == ([(5, "/out/5")] if not saves_itself else [])
    rank = Rank(tmp_path, 0, 1, Controls(stop=lambda: done.append("stop")))
    rank.give(1, "stop")
    rank.control.at_boundary(5)
    assert done == ["stop", "stop"] and rank.link.saved == []


def test_a_stop_whose_checkpoint_fails_stops_and_says_so(tmp_path: Path) -> None:
    stopped = []

    def save() -> str:
        raise OSError("the disk is full")

    rank = Rank(tmp_path, 0, 1, Controls(save=save, stop=lambda: stopped.append(1)))
    rank.give(1, "stop")
    rank.control.at_boundary(5)
    assert stopped == [1]
    assert rank.link.events == ["stopping at step 5 without a checkpoint: OSError: the disk is full"]


def test_a_save_that_tells_of_its_checkpoint_itself_is_told_once(tmp_path: Path) -> None:
    def save() -> str:
        rank.control.announce("/out/own", 5, 0.1)
        rank.control.saved("/out/own", 5)
        return "/out/own"

    rank = Rank(tmp_path, 0, 1, Controls(save=save))
    rank.give(1, "checkpoint")
    rank.control.at_boundary(5)
    assert rank.link.saved == [(5, "/out/own")]
    assert rank.link.answers == [("checkpoint-1", "accepted"), ("checkpoint-1", "applied")]


def test_a_rank_without_supervisor_stops_where_it_can(tmp_path: Path) -> None:
    stopped = []
    rank = Rank(tmp_path, 0, 1, Controls(stop=lambda: stopped.append(1)))
    rank.link.inbox.mark_orphaned()
    rank.control.at_boundary(1)
    rank.control.at_boundary(2)
    assert stopped == [1] and rank.control.stop_asked
