"""Follows the training loop of a trainer that is not ours: phases, steps, memory, commands."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from runtime.process.forked import at_exit
from runtime.telemetry.device_phases import Marks
from runtime.telemetry.null import NullTelemetry
from runtime.telemetry.publisher import Telemetry
from runtime.telemetry.watching.collectives import FlightPosition, StepCollectives, collectives_entered
from runtime.telemetry.watching.control import Agreement, WatcherControl
from runtime.telemetry.watching.guard import never_raises
from runtime.telemetry.watching.held import Held, held_by
from runtime.telemetry.watching.introduction import Introduction, Place, Trainer, attempt, last_error, process_memory
from runtime.telemetry.watching.scalars import LateNumber, Pace
from runtime.telemetry.watching.versions import unsupported
from runtime.wire.finetuning import Evaluation
from runtime.wire.messages import Memory, PhaseName, StepResult
from runtime.wire.rundir import RunFile

FIRST_STEPS = 3
"""Optimizers make their states in the first steps, so memory by category is counted in each of them."""
END_OF_BACKWARD = "end of backward"
"""The waits there are of one or several collectives, whose own times are not known. As one without bytes they tell
which rank comes last."""
COUNTED_EVERY_S = 15.0
"""And later at this interval."""


class _Late(NamedTuple):
    """The result of a step, with figures that may still be on their way from the device."""

    result: StepResult
    figures: dict[str, Any]
    losses: list[LateNumber]
    checked: list[LateNumber]
    lr_factor: float

    def numbers(self) -> Iterator[LateNumber]:
        """All that may be on their way."""
        yield from (figure for figure in self.figures.values() if isinstance(figure, LateNumber))
        yield from self.losses
        yield from self.checked


class Watcher:
    """The watch of one rank; `watch` returns it. Outside a run it does nothing.

    A script may use `log` for figures that nobody else can know, `phase` for phases of its own, and `should_stop` to
    end its loop when `zerotop stop` asks.
    """

    def __init__(
        self, link: Telemetry | NullTelemetry, place: Place, trainer: Trainer, run: RunFile | None = None
    ) -> None:
        self.link, self.place, self.trainer = link, place, trainer
        self.step = trainer.start_step
        """Optimizer steps finished so far."""
        self._micro_step = 0
        self._micro_losses: list[LateNumber] = []
        self._tokens = self._samples = 0
        self._figures: dict[str, Any] = {}
        self._waiting: StepResult | None = None
        self._late: deque[_Late] = deque()
        """Results whose figures have not arrived from the device yet."""
        self._pace = Pace.of(place.device)
        self._step_began_ns = time.monotonic_ns()
        self._best: tuple[float, int] | None = None
        self._losses: list[LateNumber] = []
        """Of the micro-steps of the waiting result."""
        self._micro_checked: list[LateNumber] = []
        """Losses of the micro-steps so far that only tell whether the step's loss is finite."""
        self._checked: list[LateNumber] = []
        """The same of the waiting result."""
        self._scales_loss = trainer.precision == "fp16"
        """Under fp16 an infinite gradient norm is part of finding the loss scale: the scaler skips that step."""
        self._last_is_finite = True
        self._collectives: StepCollectives | None = None
        self._entered_before: int | None = None
        """Collectives issued when the reduction of gradients could begin; None: not known."""
        self._reduces = True
        self._reduce_began_ns = 0
        self._held = Held(place.device.split(":")[0])
        self._counted_at = 0.0
        self._looked_for_stop = False
        self.catch_up: Callable[[], object] = lambda: None
        """Tells of a step that has ended unnoticed, for trainers that tell nobody."""
        self._checked_packages: set[str] = set()
        self._detach: list[Callable[[], None]] = []
        self.closed = False
        self._introduction = Introduction(place, trainer, run)
        folder = Path(run.sockets) if run is not None else Path()
        self.control = WatcherControl(
            link, place.rank, Agreement(folder, attempt(), place.world_size, self._pace.ahead), trainer.controls
        )
        if not isinstance(link, Telemetry):
            return
        self.control.attach()
        link.memory_source = self._memory
        if place.world_size > 1:
            link.collective_position = FlightPosition()
            self._collectives = StepCollectives(place.rank, trainer.start_step)
            link.counted_collectives = self._collectives.take
        if place.device.startswith("cuda"):
            link.follow_device(_marks(place.device))
        link.start(self._introduction.hello())
        self.warn_of_versions(trainer.packages)
        at_exit(self._exit)

    # ---- what a script may call ------------------------------------------------------------------------------------
    def log(self, **figures: Any) -> None:
        """Add figures to the step in progress, or to the last one where a trainer logs after its step: loss, grad_norm,
        lr, tokens, samples. loss and grad_norm may be tensors of one element, which nobody waits for; tokens and
        samples are this rank's in the step. Raises TypeError for another name."""
        for name, value in figures.items():
            if name not in ("loss", "grad_norm", "lr", "tokens", "samples"):
                raise TypeError(f"log() takes loss, grad_norm, lr, tokens and samples, not {name!r}")
            self._figures[name] = LateNumber(value) if name in ("loss", "grad_norm") else value

    def phase(self, name: PhaseName) -> AbstractContextManager[None]:
        """A phase of your own, such as `with watcher.phase("eval"):`."""
        return self.link.span(name)

    @property
    def should_stop(self) -> bool:
        """Whether the run has been asked to stop: a loop that ends then, after saving what it wants to keep, makes
        `zerotop stop` possible."""
        if not self._looked_for_stop:
            self._looked_for_stop = True
            if self.trainer.controls.stop is None:
                self.trainer.controls.stop = lambda: None
                self.renew()
        self.catch_up()
        return self.control.stop_asked

    @property
    def active(self) -> bool:
        """Whether there is a run that is told."""
        return isinstance(self.link, Telemetry)

    def saved(self, path: str | os.PathLike[str], *, seconds: float = 0.0, blocked_ms: float | None = None) -> None:
        """A checkpoint of the last step is complete at `path`; rank 0 tells the run."""
        self.control.announce(str(path), self.step, seconds, blocked_ms)
        self.control.saved(str(path), self.step)

    def evaluated(self, loss: float, *, tokens: int = 0, samples: int = 0, seconds: float = 0.0) -> None:
        """An evaluation after the last step has given this mean loss over so many tokens or samples; rank 0 tells the
        run."""
        if self.place.rank != 0:
            return
        best = math.isfinite(loss) and (self._best is None or loss < self._best[0])
        if best:
            self._best = (loss, self.step)
        self.link.evaluation(
            Evaluation(
                rank=0,
                step=self.step,
                loss=loss,
                tokens=tokens,
                samples=samples,
                seconds=seconds,
                best=best,
                best_step=self._best[1] if self._best else None,
                wall_s=time.time(),
            )
        )

    def warn_of_versions(self, packages: Iterable[str]) -> None:
        """Warn the run, once each, of loaded packages whose version is not supported."""
        for text in unsupported(one for one in packages if one not in self._checked_packages):
            if self.place.rank == 0:
                self.link.event("unsupported version", text, severity="warning", of_run=True)
        self._checked_packages.update(packages)

    def renew(self) -> None:
        """Introduce this rank again, because what is known of its trainer has changed."""
        if isinstance(self.link, Telemetry):
            self.link.introduce(self._introduction.hello(self.control.lr_factor))

    def close(self, outcome: str = "", error: str = "") -> None:
        """End the watch: hooks are removed and the last figures sent. Called at exit, too. A later watch of this
        process may follow."""
        if self.closed:
            return
        self._end()
        how = outcome or ("stopped" if self.control.stop_asked else "finished")
        self.link.goodbye(how, self.step, error)  # type: ignore[arg-type]

    def hand_over(self) -> None:
        """End the watch without a goodbye: another one of this process follows at once."""
        if not self.closed:
            self._end()

    def _end(self) -> None:
        self.closed = True
        never_raises(self._flush)(final=True)  # after an error in training, a device may not give its numbers any more
        for work in (*self._detach, self.control.close):
            never_raises(work)()
        self._detach.clear()
        # A training that is tried again after it ran out of memory must find free what the first one held.
        self.trainer.modules, self.trainer.optimizers, self.trainer.controls.optimizers = (), (), ()
        self._losses, self._micro_losses, self._figures = [], [], {}
        self._late.clear()
        if isinstance(self.link, Telemetry):
            self.link.offer()  # it stays open until the process exits: the hub knows one connection of a rank

    def on_close(self, detach: Callable[[], None]) -> None:
        """Call `detach` when the watch ends."""
        self._detach.append(detach)

    # ---- the loop: what the hooks and integrations call ------------------------------------------------------------
    def forward_begins(self, samples: int | None = None, tokens: int | None = None) -> None:
        """The next micro-step begins."""
        self._flush()
        self._micro_step += 1
        self._samples += samples or 0
        self._tokens += tokens or 0
        self._scales_loss = self._scales_loss or self._autocasts_to_fp16()
        self.link.enter("forward", self.step + 1, self._micro_step)

    def forward_ended(self, loss: Any = None) -> None:
        """Its forward has returned. The mean of its losses is the step's, unless `log` says another one."""
        if loss is not None:
            self._micro_losses.append(LateNumber(loss))

    def check_loss(self, loss: Any) -> None:
        """For trainers with a rule of their own for the loss of a step: the loss of a micro-step, of which only NaN or
        infinity is taken over."""
        if loss is not None:
            self._micro_checked.append(LateNumber(loss))

    def backward_begins(self) -> None:
        """Autograd has begun."""
        # False under DistributedDataParallel.no_sync(): gradients are only accumulated.
        self._reduces = self.place.world_size > 1 and all(
            getattr(module, "require_backward_grad_sync", True) for module in self.trainer.modules
        )
        if self._reduces:
            self._entered_before = self._entered()
        self.link.enter("backward")

    def gradients_computed(self) -> None:
        """What follows is waiting for communication."""
        if not self._reduces:
            return
        if self.trainer.stage == 3:  # parameters are gathered until here, whether or not gradients are reduced
            self._entered_before = self._entered()
        self._reduce_began_ns = time.monotonic_ns()
        self.link.enter("reduce")

    def backward_ended(self) -> None:
        """The micro-step is over. If something was reduced, the ranks have met: who waited least came last."""
        began, self._reduce_began_ns = self._reduce_began_ns, 0
        if began and self.place.device == "cpu" and isinstance(self.link, Telemetry):  # GPUs' hosts do not wait here
            now, entered, before = time.monotonic_ns(), self._entered(), self._entered_before
            if entered is None or before is None or entered > before:
                seq = self.link.issued(END_OF_BACKWARD, 0)
                self.link.completed(seq, END_OF_BACKWARD, 0, began, now, now - began)
        self.link.enter("data")

    def _entered(self) -> int | None:
        """Collectives issued so far, where it matters."""
        return collectives_entered() if self.place.device == "cpu" and self.active else None

    def evaluation_begins(self) -> None:
        """The model is called in evaluation mode."""
        self.link.enter("eval", self.step, 0)

    def evaluation_ended(self) -> None:
        """That call has returned; the next one may follow."""

    def step_begins(self) -> None:
        """The optimizer steps: now there are gradients, and from the second step on its states."""
        first = self.step - self.trainer.start_step < FIRST_STEPS
        if first or time.monotonic() - self._counted_at >= COUNTED_EVERY_S:
            self._count_memory()
        self.link.enter("step", self.step + 1, self._micro_step)

    def step_ended(self) -> None:
        """The optimizer has stepped: the boundary. Commands apply here."""
        self.step += 1
        self._pace.step()
        if self._collectives is not None:
            self._collectives.step_ended(self.step)
        self._result()
        self._micro_step = self._tokens = self._samples = 0
        self._micro_losses, self._micro_checked = [], []
        if not self.trainer.late_results:
            self._flush()
            self.control.at_boundary(self.step)
        self.link.enter("data", self.step + 1, 0)

    def boundary(self) -> None:
        """For trainers with `late_results`: they have come to the place where they can obey commands."""
        self.control.at_boundary(self.step)
        self.link.enter("data", self.step + 1, 0)

    # ---- figures ---------------------------------------------------------------------------------------------------
    def _result(self) -> None:
        self._flush()
        now = time.monotonic_ns()
        seconds, self._step_began_ns = max(1e-9, (now - self._step_began_ns) / 1e9), now
        tokens = self._figures.pop("tokens", self._tokens)
        samples = self._figures.pop("samples", self._samples)
        self._waiting = StepResult(
            rank=self.place.rank,
            step=self.step,
            loss=None,
            lr=self._learning_rate(),
            grad_norm=None,
            step_ms=round(seconds * 1e3, 3),
            tokens_per_s=round(tokens / seconds, 3) if tokens else None,
            samples_per_s=round(samples / seconds, 3) if samples else None,
            end_ns=now,
        )
        self._losses, self._checked = self._micro_losses, self._micro_checked

    def _flush(self, final: bool = False) -> None:
        """The waiting result has all its figures: send it, and those before it, as far as they have arrived from the
        device. final: wait for the device."""
        result, self._waiting = self._waiting, None
        if result is not None:
            figures, self._figures = self._figures, {}
            self._late.append(_Late(result, figures, self._losses, self._checked, self.control.lr_factor))
        while self._late and (final or all(number.arrived for number in self._late[0].numbers())):
            self._send(self._late.popleft())

    def _send(self, late: _Late) -> None:
        loss, norm = late.figures.get("loss"), late.figures.get("grad_norm")
        if loss is not None:
            value = loss.read()
        else:
            read = [one for one in (number.read() for number in late.losses) if one is not None]
            value = sum(read) / len(read) if read and len(read) == len(late.losses) else None
        for checked in (number.read() for number in late.checked):
            if checked is not None and not math.isfinite(checked):
                value = checked  # a trainer may log the mean of the others
        grad_norm = norm.read() if norm is not None else None
        if self._scales_loss and not _is_finite(grad_norm):
            grad_norm = None
        changes: dict[str, Any] = {"loss": value, "grad_norm": grad_norm}
        if late.figures.get("lr") is not None:
            changes["lr"] = float(late.figures["lr"]) * late.lr_factor
        self.link.step(late.result.model_copy(update=changes))
        self._report_nonfinite(late.result.step, value, grad_norm)

    def _report_nonfinite(self, step: int, loss: float | None, grad_norm: float | None) -> None:
        """Report the first of several steps in a row that are not finite: each rank whose loss it is, and rank 0 where
        it is only the gradients'."""
        was_finite, self._last_is_finite = self._last_is_finite, _is_finite(loss) and _is_finite(grad_norm)
        if self._last_is_finite or not was_finite:
            return
        of_gradients = f"the gradient norm is {grad_norm}"
        if not _is_finite(loss):
            text = f"step {step}: the loss is {loss}" + ("" if _is_finite(grad_norm) else f", {of_gradients}")
            self.link.event("not finite", text, severity="error", step=step)
        elif self.place.rank == 0:
            self.link.event("not finite", f"step {step}: {of_gradients}", severity="error", step=step, of_run=True)

    def _autocasts_to_fp16(self) -> bool:
        torch, device = sys.modules.get("torch"), self.place.device.split(":")[0]
        return (
            torch is not None
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) is torch.float16
        )

    def _learning_rate(self) -> float:
        for optimizer in self.trainer.optimizers:
            for group in getattr(optimizer, "param_groups", ()):
                return float(group["lr"]) * self.control.lr_factor
        return 0.0

    # ---- memory ----------------------------------------------------------------------------------------------------
    def _count_memory(self) -> None:
        self._counted_at = time.monotonic()
        self._held = held_by(self.trainer.modules, self.trainer.optimizers, self.place.device.split(":")[0])
        self.link.memory_changed()

    def _memory(self) -> Memory:
        """Called by the publisher's thread."""
        return process_memory(self.place, self._held)

    def _exit(self) -> None:
        error = last_error()
        self.close("failed" if error else "", error)


def _marks(device: str) -> Marks:
    """Marks in the compute stream of a GPU."""
    from runtime.telemetry.device_time import DeviceTime, StreamMarks

    torch = sys.modules["torch"]
    on = torch.device(device)
    return StreamMarks(on, DeviceTime(torch.cuda.Stream(on)))


def _is_finite(value: float | None) -> bool:
    """Whether `value` is finite; an unknown one (None) counts as finite."""
    return value is None or math.isfinite(value)
