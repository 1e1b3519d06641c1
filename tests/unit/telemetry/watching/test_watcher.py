"""What a watcher makes of a training loop: results, NaN, and that it never raises into the loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.telemetry import NullTelemetry
from runtime.telemetry.watching import Trainer, Watcher, guard
from runtime.telemetry.watching.control import AHEAD, Agreement
from runtime.telemetry.watching.deepspeed import watch_engine
from runtime.telemetry.watching.guard import attribute, never_raises
from runtime.telemetry.watching.hooks import attach_model, attach_optimizer
from runtime.telemetry.watching.introduction import Place
from runtime.telemetry.watching.scalars import RUN_AHEAD, Pace
from runtime.wire.messages import StepResult


class Link(NullTelemetry):
    """A rank's telemetry that keeps its results and events."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[StepResult] = []
        self.events: list[tuple[str, str, str, int | None, bool]] = []

    def step(self, result: StepResult) -> None:
        self.results.append(result)

    def event(self, what: str, text: str, **named: Any) -> None:
        self.events.append((what, text, named["severity"], named["step"], named.get("of_run", False)))


def watcher_of(link: Link, rank: int = 0, precision: str = "fp32", late: bool = False) -> Watcher:
    return Watcher(link, Place(rank=rank, world_size=2), Trainer("torch", precision=precision, late_results=late))


class Loss(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch * self.weight).square().mean()


def train(watcher: Watcher, batches: list[torch.Tensor], micro_steps: int = 1) -> None:
    model = Loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remove = (attach_model(model, watcher), attach_optimizer(optimizer, watcher))
    for start in range(0, len(batches), micro_steps):
        for batch in batches[start : start + micro_steps]:
            model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in remove:
        one()


GOOD, BAD = torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])


def test_nan_in_the_data_is_the_loss_of_its_step_and_one_event_of_the_rank() -> None:
    link = Link()
    train(watcher_of(link, rank=1), [GOOD, GOOD, GOOD, BAD, GOOD, GOOD], micro_steps=2)
    losses = [result.loss for result in link.results]
    assert losses[0] == 1.0 and all(math.isnan(loss) for loss in losses[1:])  # the weights are NaN from then on
    assert link.events == [("not finite", "step 2: the loss is nan", "error", 2, False)]


def test_a_norm_that_is_not_finite_concerns_the_run_and_rank_0_says_so() -> None:
    links = [Link(), Link()]
    for rank, link in enumerate(links):
        watcher = watcher_of(link, rank)
        for norm in (1.0, math.inf, math.inf, 1.0, math.nan):
            watcher.log(loss=0.5, grad_norm=norm)
            watcher.step_ended()
        assert link.results[1].grad_norm == math.inf
    assert [(step, of_run) for _, _, _, step, of_run in links[0].events] == [(2, True), (5, True)]
    assert links[0].events[1][1] == "step 5: the gradient norm is nan"
    assert links[1].events == []


def test_an_overflow_that_the_loss_scaler_skips_is_no_event() -> None:
    link = Link()
    watcher = watcher_of(link, precision="fp16")
    watcher.log(loss=0.5, grad_norm=math.inf)
    watcher.step_ended()
    assert link.results[0].grad_norm is None and link.events == []
    watcher.log(loss=math.nan, grad_norm=math.nan)  # no scale mends a loss
    watcher.step_ended()
    assert [text for _, text, *_ in link.events] == ["step 2: the loss is nan"]


def test_fp16_is_known_from_autocast() -> None:
    link = Link()
    watcher = watcher_of(link)
    with torch.autocast("cpu", dtype=torch.float16):
        watcher.forward_begins()
    watcher.log(grad_norm=math.inf)
    watcher.step_ended()
    assert link.events == []


def test_a_trainer_that_logs_a_mean_without_the_nan_does_not_hide_it() -> None:
    link = Link()
    watcher = watcher_of(link, late=True)
    for checked in (2.0, math.nan):
        watcher.check_loss(checked)
        watcher.step_ended()
        watcher.log(loss=0.5)
    watcher.close()
    assert link.results[0].loss == 0.5 and math.isnan(link.results[1].loss or 0.0)
    assert [text for _, text, *_ in link.events] == ["step 2: the loss is nan"]


def test_an_evaluation_that_is_nan_is_not_the_best() -> None:
    told: list[Any] = []
    link = Link()
    link.evaluation = told.append  # type: ignore[method-assign]
    watcher = watcher_of(link)
    for loss in (math.nan, 2.0, math.nan):
        watcher.evaluated(loss)
    assert [one.best for one in told] == [False, True, False]
    assert [one.best_step for one in told] == [None, 0, 0]


# ---- no harm to the training -----------------------------------------------------------------------------------------
@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_warned", set())


@pytest.mark.usefixtures("unwarned")
def test_a_hook_that_fails_is_warned_of_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    watcher = watcher_of(Link())
    watcher.forward_begins = lambda *_given: 1 / 0  # type: ignore[method-assign, assignment]
    watcher.step_ended = lambda *_given: 1 / 0  # type: ignore[method-assign, assignment]
    train(watcher, [GOOD, GOOD])
    assert len(caplog.messages) == 2  # one of each
    assert "ZeroDivisionError" in caplog.messages[0]


def test_a_guarded_function_returns_what_it_returns() -> None:
    assert never_raises(lambda: 3)() == 3
    with pytest.raises(KeyboardInterrupt):
        never_raises(_interrupted)()


def _interrupted() -> None:
    raise KeyboardInterrupt


class Engine(nn.Module):
    """An engine of another version of DeepSpeed: some methods are properties here, some are gone, and one raises."""

    global_steps = 3
    optimizer = None
    gradient_accumulation_steps = 2

    def __init__(self) -> None:
        super().__init__()
        self.module = Loss()

    def zero_optimization_stage(self) -> int:
        raise NotImplementedError


@pytest.mark.usefixtures("unwarned")
def test_an_engine_of_another_version_is_watched_as_far_as_it_tells(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZEROTOP_RUN", raising=False)
    trainer = watch_engine(Engine(), None).trainer
    assert (trainer.stage, trainer.accumulation, trainer.start_step, trainer.micro_batch) == (0, 2, 3, 0)
    assert any("zero_optimization_stage can't be read: NotImplementedError" in text for text in caplog.messages)
    assert attribute(Engine(), "no_such_thing", 7) == 7


def test_a_loop_that_asks_whether_to_stop_is_told_at_the_step_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine tells nobody of its step: without the question, the next forward finds out."""
    monkeypatch.delenv("ZEROTOP_RUN", raising=False)
    monkeypatch.setattr(Watcher, "active", True)
    engine = Engine()
    watcher = watch_engine(engine, None)
    engine.global_steps = 4
    assert watcher.step == 3 and not watcher.should_stop
    assert watcher.step == 4


# ---- a device that is behind its host --------------------------------------------------------------------------------
class Mark:
    """An event in a device's stream."""

    def __init__(self, number: int, waited: list[int]) -> None:
        self._number, self._waited = number, waited

    def synchronize(self) -> None:
        self._waited.append(self._number)


class Late:
    """A loss that the device computes."""

    def __init__(self, value: float) -> None:
        self.value, self.arrived, self.waited = value, False, False

    def read(self) -> float:
        self.waited |= not self.arrived
        return self.value


def test_the_host_is_kept_near_its_device_and_waits_for_nothing_else() -> None:
    waited: list[int] = []
    numbers = iter(range(1, 10))
    pace = Pace(lambda: Mark(next(numbers), waited))
    for _ in range(5):
        pace.step()
    assert waited == [1, 2, 3] and pace.ahead == RUN_AHEAD == 2
    assert Pace.of("cpu").ahead == 0
    Pace.of("cpu").step()


def launch(watcher: Watcher, monkeypatch: pytest.MonkeyPatch, losses: list[Late]) -> None:
    """Steps whose losses are not there yet."""
    monkeypatch.setattr("runtime.telemetry.watching.watcher.LateNumber", Late)
    for loss in losses:
        watcher.forward_begins()
        watcher._micro_losses.append(loss)  # type: ignore[arg-type]
        watcher.step_begins()
        watcher.step_ended()


def test_a_result_is_sent_when_its_loss_has_arrived_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link()
    watcher = watcher_of(link)
    losses = [Late(4.0), Late(3.0), Late(2.0)]
    launch(watcher, monkeypatch, losses)
    assert link.results == []
    losses[1].arrived = True
    watcher.forward_begins()
    assert link.results == []
    losses[0].arrived = True
    watcher.forward_begins()
    assert [(one.step, one.loss) for one in link.results] == [(1, 4.0), (2, 3.0)]
    assert not any(loss.waited for loss in losses)
    watcher.close()
    assert [one.loss for one in link.results] == [4.0, 3.0, 2.0] and losses[2].waited


def test_commands_of_hosts_that_run_ahead_apply_later(tmp_path: Path) -> None:
    on_cpu, on_gpu = Agreement(tmp_path, 1, 2), Agreement(tmp_path, 2, 2, RUN_AHEAD)
    for agreement in (on_cpu, on_gpu):
        agreement.propose(1, step=10)
    assert next(step for step in range(10, 20) if on_cpu.due(step)) == 10 + AHEAD
    assert next(step for step in range(10, 20) if on_gpu.due(step)) == 10 + AHEAD + RUN_AHEAD
