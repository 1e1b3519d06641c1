"""What trackers get: every step once, in order, also over a broken connection and a restart."""

from __future__ import annotations

import math
from typing import Any

from runtime.config import load
from runtime.wire.base import Message
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import Memory, RunStatus
from tests.harness.fakehub import hello, step_result
from zerotop.outputs.points import Point, Points, hyperparameters
from zerotop.state.run import RunState


class Played:
    def __init__(self, after: int = 0) -> None:
        self.state = RunState()
        self.points = Points(after)
        self.say(hello(0, world_size=2), hello(1, world_size=2))

    def say(self, *messages: Message) -> list[Point]:
        self.state.apply_all(messages, 1)
        return list(self.points.new(self.state, messages))

    def steps(self, *messages: Message) -> list[int]:
        return [point.step for point in self.say(*messages)]


def test_every_step_of_the_lowest_rank_once() -> None:
    run = Played()
    assert run.steps(step_result(0, 1), step_result(1, 1), step_result(0, 2)) == [1, 2]
    assert run.steps(step_result(1, 2), step_result(0, 3)) == [3]
    assert run.steps() == []


def test_the_figures_of_a_step() -> None:
    run = Played()
    memory: dict[str, Any] = {"ledger": {}, "rss_bytes": 4096, "host_total_bytes": 1, "at_ns": 0}
    run.say(Memory(rank=0, **memory, device_used_bytes=70, device_total_bytes=80), Memory(rank=1, **memory))
    (point,) = run.say(step_result(1, 1, tokens_per_s=500.0), step_result(0, 1, wait_ms=20.0, loss=math.nan))
    values = point.values
    assert math.isnan(values.pop("train/loss"))
    assert values == {
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.5,
        "speed/step_s": 0.1,
        "speed/wait_s": 0.02,
        "speed/tokens_per_s": 1500.0,
        "memory/vram_max_bytes": 70.0,
        "memory/rss_max_bytes": 4096.0,
    }


def test_an_evaluation_is_a_point_of_its_own() -> None:
    run = Played()
    run.say(step_result(0, 9))
    (point,) = run.say(Evaluation(rank=0, step=9, loss=2.0, wall_s=7.0))
    assert (point.step, point.wall_s, point.values) == (9, 7.0, {"eval/loss": 2.0, "eval/perplexity": math.exp(2.0)})
    assert run.steps(Evaluation(rank=0, step=10, loss=None, wall_s=8.0)) == []


def test_a_new_state_after_a_broken_connection_fills_the_gap() -> None:
    run = Played()
    assert run.steps(step_result(0, 1)) == [1]
    later = RunState()
    later.apply_all([hello(0), *(step_result(0, step) for step in range(1, 6))], 1)
    run.state = later
    assert run.steps(step_result(0, 6)) == [2, 3, 4, 5, 6]


def test_steps_that_a_restart_replays_are_written_once() -> None:
    run = Played()
    assert run.steps(*(step_result(0, step) for step in range(1, 9))) == list(range(1, 9))
    run.say(RunStatus(name="r1", state="restarting", attempt=2), hello(0, attempt=2, start_step=5))
    assert run.steps(*(step_result(0, step) for step in range(6, 11))) == [9, 10]


def test_a_resumed_run_begins_behind_its_checkpoint() -> None:
    run = Played(after=5)
    assert run.steps(*(step_result(0, step) for step in range(1, 8))) == [6, 7]


def test_hyperparameters_name_no_path() -> None:
    resolved = load({"zerotop": {"model": {"path": "/home/somebody/model"}, "data": {"files": ["/secret/x.jsonl"]}}})
    settings = hyperparameters(resolved.resolve(2, "cpu"), hello(0, model_name="/home/somebody/model"))
    assert settings["model"] == "model" and settings["zero_stage"] == 0 and settings["optimizer"] == "AdamW"
    assert not any("/" in str(value) for value in settings.values())
