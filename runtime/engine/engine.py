"""The engine: a model cut into units, and DeepSpeed's calls around it.

engine, optimizer, loader, scheduler = initialize(model=model, config="config.json")
loss = engine(inputs, targets)     forward
engine.backward(loss)              gradients land in flat buffers; complete units are reduced meanwhile
engine.step()                      at the end of an accumulation: agree on norm and commands, clip, update, gather
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.checkpoint.background import Background
from runtime.checkpoint.calls import CheckpointCalls
from runtime.checkpoint.optimizer_states import bind_states
from runtime.checkpoint.registered import Registered
from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine import registry as engines
from runtime.engine.answers import Answers
from runtime.engine.modulecalls import ModuleCalls
from runtime.engine.settings import Settings
from runtime.engine.setup import Assembly, Session, assemble
from runtime.engine.steer import Steering
from runtime.host.ledger import Ledger
from runtime.offload.parking import Parking
from runtime.optim.optimizer import ZeroOptimizer
from runtime.optim.updates import Updates
from runtime.state.precision import ScaleExhausted, TrainingError, note_wide_buffers, scaler_for
from runtime.wire.messages import StepResult
from runtime.zero.full import WholeModel
from runtime.zero.partition_parameters import mark, unmark
from runtime.zero.reduce import Schedule
from runtime.zero.script_backward import ScriptBackward, engine_backward
from runtime.zero.script_changes import ScriptChanges
from runtime.zero.step_stats import Boundary, agree, clip_coefficient
from runtime.zero.unshard import Gathering

log = logging.getLogger("runtime.engine")


class Engine(Answers, Settings, ModuleCalls, CheckpointCalls, nn.Module):  # type: ignore[misc]
    """One rank's part of a training run. Made by `initialize`.

    It is a module around the model, as DeepSpeed's engine is: hooks on it run around every forward. Names in its
    named_parameters() and state_dict() are the model's. Without an optimizer it computes and does not train.
    """

    def __init__(
        self, module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm, session: Session
    ) -> None:
        super().__init__()
        self.module, self.config, self.optimizer, self.comm, self.session = module, config, optimizer, comm, session
        self.__dict__["module"] = module  # found without going through nn.Module.__getattr__
        self.telemetry = session.recorder
        self.device, self.ledger = comm.device, Ledger()
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        """What initialize(training_data=...) returned."""
        self.global_steps = 0
        """Optimizer steps, skipped ones included: what progress and checkpoints count."""
        self.micro_steps = 0
        self.optimizer_steps = 0
        """Updates really taken: Adam's bias correction counts these."""
        self.foreign_steps = 0
        """Steps of a loaded checkpoint whose optimizer states were left behind."""
        self.lr_factor = 1.0
        self.registered = Registered()
        self.client_state: dict[str, Any] = {}
        """What save_checkpoint() was given last, or what the loaded checkpoint held: also keyboard checkpoints carry
        it."""
        self.last_checkpoint: Path | None = None
        """What the script saved or loaded last."""
        self._norm: float | None = None
        self._failure = ""
        """What a backward that failed makes of this engine."""
        self._boundary: bool | None = None
        """What the script says about boundaries."""
        self._reduced_for: bool | None = None
        """Whether the last backward outside no_sync took this for a boundary."""
        self._syncing = True
        self._backwards = 0  # since the last step(), outside no_sync
        self._micro_backwards = 0  # since the last boundary
        self._by_script = False
        """The script ran the last backward itself, and step() has not taken it yet."""
        self._scaled = False
        """scale() was called for the script's next backward."""
        self._loss_sum: torch.Tensor | float = 0.0
        self._losses = 0
        self._tokens = 0
        self._stepped = False
        """Whether the last step() updated the parameters."""
        self._accumulating_since = 0
        """The micro-step from which accumulations are counted: set_train_batch_size() changes how many make one."""
        engines.release(module)  # an earlier engine on the same model must not go on taking its gradients
        self._trained_before = [p for p in module.parameters() if p.requires_grad and not optimizer.trains]
        """An engine without an optimizer keeps no gradients: what it holds requires one again when it lets go."""
        for parameter in module.parameters():
            unmark(parameter)  # zero.Init marks what it builds; below stage 3 nothing is sharded
        parts: Assembly = assemble(module, config, optimizer, comm, self.ledger)
        self.policy, self.units, self.frozen, self.rules = parts.policy, parts.units, parts.frozen, parts.rules
        self.flats = parts.flats
        """Trained flat buffers in forward order: the order of updates."""
        self.frozen_flats = [flat for unit in parts.units for flat in unit.frozen]
        self._pre_scale = parts.numbers.scale
        self.scaler = scaler_for(config)
        self._script_backward = ScriptBackward(self)
        self.schedule = Schedule(parts.reduce_order, comm, self._script_backward.begins)
        self.gathering = Gathering(module, parts.units, self.telemetry, comm.gather_objects)
        self._downlink, self.pool = parts.placing.downlink, parts.pool
        self.working_memory = parts.placing.working_memory
        """Device memory of no flat."""
        self.parking = Parking(self)
        self.saver = Background(self)
        self.updates = Updates(
            module,
            parts.units,
            parts.rules,
            self.telemetry,
            parts.placing.executor,
            parts.placing.side,
            parts.placing.overlap,
            on_idle=engines.when_alive(self, engines.complete),
            before=self.saver.before_update,
        )
        self._transfers = parts.placing.transfers
        self._changes = ScriptChanges(
            module, self.flats, self.frozen_flats, self.frozen, self.saver.before_change, comm.rank == 0
        )
        self.whole = WholeModel(module, parts.units, self.gathering, comm, self.updates.drain, self.saver.before_change)
        engines.hold(module, self)
        for _, parameter in self.frozen if self.policy.own_parameters else ():
            mark(parameter)
        optimizer.seal(self)
        bind_states(self)
        optimizer.on_zero_grad = engines.when_alive(self, Engine.zero_grad)
        self.steering = Steering(self, session)
        weak = weakref.ref(self)  # the session outlives engines
        session.step = lambda: engine.global_steps if (engine := weak()) else 0
        self._began_ns = time.monotonic_ns()

    # ---- forward, backward, step ---------------------------------------------------------------------------
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward. Its phase in telemetry lasts until backward() begins."""
        self.parking.check("forward()", ("parameters", "buffers"))
        if self.module.training and torch.is_grad_enabled():
            self.telemetry.enter("forward", self.global_steps + 1, self._micro_step)
            self._tokens += _tokens_in(inputs, named)
        else:
            self.telemetry.enter("eval", self.global_steps + 1, 0)
        try:
            output = self.module(*inputs, **named)
        except RuntimeError as error:
            note_wide_buffers(error, self.module, self.config.precision)
            raise
        self._script_backward.watch(output)
        return output

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Backward of one micro-step. `loss` is a scalar, the mean over this micro-batch; the engine averages
        micro-steps and ranks. Several before one step() add up.

        scale_wrt_gas: divide the loss by gradient_accumulation_steps(); False where the script has done it. Returns
        the loss so divided. Raises ValueError for anything that backward can't start from. After any other exception
        in here this engine can't go on: what was under way on this rank is not on the others.
        """
        self._refuse_without_optimizer("backward(loss)")
        self.parking.check("backward(loss)")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"engine.backward(loss): expected a scalar tensor that requires grad, got {_describe(loss)}"
            )
        self._refuse_after_failure()
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        try:
            with engine_backward():
                self._begin_backward()
                (loss * (self.scaler.scale / steps)).backward(retain_graph=retain_graph)
                self._end_backward()
        except BaseException as error:
            self.schedule.abandon()
            self._failure = f"engine.backward(loss) at step {self.global_steps + 1} ended with {type(error).__name__}"
            if self.gathering.units and "storage of size 0" in str(error):  # torch's words for memory that was released
                raise RuntimeError(
                    "stage 3: backward reached parameters of a unit that was released: its forward's results came back "
                    "by a way that no hook sees (a backward through a backward, create_graph=True, does that). Use "
                    "zero_optimization.stage 2 for this model, or hold the units in zero.GatheredParameters meanwhile"
                ) from error
            raise
        self._count_backward(loss)
        return loss / steps

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for scripts that call .backward() on it themselves."""
        self._scaled = True
        return loss * self.scaler.scale

    def _begin_backward(self, factor: float = 1.0) -> None:
        """factor: on each gradient that arrives."""
        self.telemetry.enter("backward", self.global_steps + 1, self._micro_step)
        boundary = self.is_gradient_accumulation_boundary()
        reduce = self._syncing and (boundary or self.policy.own_gradients)
        self.updates.drain()
        self.schedule.begin_backward(reduce, self._syncing and boundary, factor)

    def _end_backward(self) -> None:
        self.schedule.end_backward()
        self.updates.check()
        self.gathering.end_backward()

    def _count_backward(self, loss: torch.Tensor | None, by_script: bool = False) -> None:
        if loss is not None:
            self._loss_sum = self._loss_sum + loss.detach().double()
            self._losses += 1
        self._micro_backwards += 1
        self._backwards += self._syncing
        self._by_script = by_script
        self._reduced_for = self.is_gradient_accumulation_boundary()

    def begin_script_backward(self) -> None:
        """The script has called .backward() on its loss. See runtime/zero/script_backward.py."""
        self._refuse_after_failure()
        if self.config.precision == "fp16" and not self._scaled:
            raise RuntimeError(
                "loss.backward() under fp16 goes without the loss scale, so small gradients would become zero: call "
                "engine.backward(loss), or engine.scale(loss).backward()"
            )
        scale = 1.0 if self._scaled else self.scaler.scale
        self._begin_backward(scale / self.gradient_accumulation_steps())

    def end_script_backward(self, loss: torch.Tensor | None) -> None:
        self._end_backward()
        self._scaled = False
        self._count_backward(loss, by_script=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of a loss.backward() that the script ran itself and no step() has taken (another
        engine's loss that came through this model). Otherwise nothing, on purpose: a step() uses the gradients and
        drops them, and scripts written for DeepSpeed call this between the micro-steps of one accumulation, where
        clearing would lose gradients."""
        if not self._by_script:
            return
        if self._micro_backwards > self._backwards:
            raise RuntimeError(
                "zero_grad() after loss.backward() in the middle of an accumulation: the gradients of its earlier "
                "micro-steps can't be told from this one's. Call engine.backward(loss), or detach() what shall not "
                "train this model"
            )
        self._drop_accumulated()

    def _refuse_after_failure(self) -> None:
        if self.schedule.inside and not self._failure:
            self._failure = f"loss.backward() at step {self.global_steps + 1} ended with an exception"
        if self._failure:
            raise RuntimeError(
                f"{self._failure}: the gradients of that backward are incomplete on this rank, and the collectives of "
                "the ranks may no longer match. Restart all ranks from the newest checkpoint"
            )

    def _refuse_without_optimizer(self, call: str) -> None:
        if not self.optimizer.trains:
            raise RuntimeError(
                f"engine.{call}: this engine was made without an optimizer, for evaluation; to train, add an "
                '"optimizer" section to the config or call initialize(optimizer=...)'
            )

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End of a micro-step; at the boundary also the optimizer step, and commands that wait are applied.

        lr_kwargs: keyword arguments for the scheduler's step(). Leaves with RunStopped (a SystemExit) after a `stop`
        command, once its checkpoint is complete.
        """
        self._refuse_without_optimizer("step()")
        self._refuse_after_failure()
        if not self._syncing:
            raise RuntimeError(
                "engine.step() inside engine.no_sync(): leave the context for the last backward, then step"
            )
        if self._backwards == 0:
            raise RuntimeError(
                "engine.step() without engine.backward(loss) before it (outside no_sync): there is no "
                "gradient to step with"
            )
        boundary = self.is_gradient_accumulation_boundary()
        if boundary != self._reduced_for:
            raise RuntimeError(
                "set_gradient_accumulation_boundary() was called between engine.backward(loss) and engine.step(), "
                "after backward had reduced the gradients, or not, by the old value; call it before backward"
            )
        self.micro_steps += 1
        self._backwards, self._by_script = 0, False
        self._stepped = False
        if boundary:
            self._optimizer_step(lr_kwargs or {})
        else:
            self.telemetry.enter("data", self.global_steps + 1, self._micro_step)

    def _optimizer_step(self, lr_kwargs: Mapping[str, Any]) -> None:
        """Agree (norm, loss, commands) -> clip -> update each unit and gather it -> report -> commands."""
        telemetry = self.telemetry
        self.optimizer.check_groups()
        self._changes.check()
        telemetry.enter("step", self.global_steps + 1, self.gradient_accumulation_steps())
        if self._downlink is not None:
            self._downlink.drain()
        divisor = self.gradient_divisor
        loss = self._loss_sum / self._losses if self._losses else None
        waits, stops, way = self.steering.command_waits(), self.steering.stop_asked(), self.gathering.take_way()
        agreed = agree(self.flats, self.comm, loss, divisor, waits, stops, way, self._changes.found())
        if agreed.changed:
            self._changes.take()
        numbers = self.optimizer.numbers(self.lr_factor)
        skipped = not math.isfinite(agreed.grad_norm)
        if not skipped:
            self._update(numbers, clip_coefficient(agreed.grad_norm, self.config.gradient_clipping) / divisor)
        self.schedule.clear()
        self.global_steps += 1
        self._stepped = not skipped
        self._norm = agreed.grad_norm
        self._report(agreed, numbers[0]["lr"], skipped, loss)
        self._rescale(skipped)
        if self.lr_scheduler is not None and not skipped:
            self.optimizer.mark_stepped()
            self.lr_scheduler.step(**lr_kwargs)
        self._loss_sum, self._losses, self._tokens, self._micro_backwards = 0.0, 0, 0, 0
        self.steering.at_boundary(agreed)
        telemetry.enter("data", self.global_steps + 1, 0)
        self._began_ns = time.monotonic_ns()

    def settle_changes(self) -> None:
        """Before masters are saved: they hear of what the script has changed since the last step."""
        self.updates.drain()
        if self._changes.found():
            self._changes.take()

    def _update(self, numbers: list[dict[str, Any]], scale: float) -> None:
        self.optimizer_steps += 1
        self.gathering.stale()
        self.updates.launch(numbers, self.optimizer_steps, scale)
        if self.updates.under_way:
            engines.keep_until_complete(self)

    def synchronize(self) -> None:
        """Returns when the last step's update is complete, for scripts that read parameters or states themselves: with
        offload it may still be under way after step()."""
        self.updates.drain()
        if self._transfers is not None:
            self._transfers.settle()  # the device writes host memory, too, and gathers read it

    def _rescale(self, overflow: bool) -> None:
        """fp16: the next loss scale. Raises TrainingError when it can't be lowered any more."""
        try:
            self.scaler.update(overflow)
        except ScaleExhausted as error:
            raise TrainingError(f"step {self.global_steps}: {error}") from None

    def _report(self, agreed: Boundary, lr: float, skipped: bool, own_loss: torch.Tensor | float | None) -> None:
        now = time.monotonic_ns()
        seconds = (now - self._began_ns) / 1e9
        samples = self.config.micro_batch * self.config.accumulation
        result = StepResult(
            rank=self.comm.rank,
            step=self.global_steps,
            loss=agreed.loss,
            lr=lr,
            grad_norm=agreed.grad_norm,
            step_ms=seconds * 1000,
            tokens_per_s=self._tokens / seconds if self._tokens else None,
            samples_per_s=samples / seconds,
            skipped=skipped,
            skipped_steps=self.skipped_steps,
            loss_scale=self.scaler.scale if self.config.precision == "fp16" else None,
            end_ns=now,
        )
        self.telemetry.step(result)
        self.steering.progress(result, own_loss)

    # ---- accumulation --------------------------------------------------------------------------------------
    @property
    def _micro_step(self) -> int:
        return min(self._micro_backwards + 1, self.gradient_accumulation_steps())

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-step under way is the accumulation's last."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps - self._accumulating_since + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From the next backward() on, until the next such call: whether the micro-step is the accumulation's last,
        instead of counting. The loss is still divided by gradient_accumulation_steps()."""
        self._boundary = bool(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate on this rank, in whole buffers at every stage; the next one outside reduces
        them all."""
        if not self._syncing:
            raise RuntimeError(
                "engine.no_sync() inside engine.no_sync(): the end of the inner one would end the outer one; enter it "
                "once around all backwards that only accumulate"
            )
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    # ---- gradients, for who reads them between backward() and step() ---------------------------------------
    @property
    def gradients_arrived(self) -> bool:
        if self._downlink is not None:
            self._downlink.drain()
        return self._micro_backwards > 0

    @property
    def gradients_reduced(self) -> bool:
        """Whether what has arrived is summed over the ranks, and not only accumulated on this one."""
        return self.policy.own_gradients or bool(self._reduced_for)

    @property
    def gradient_divisor(self) -> float:
        """Of what is held, to the mean over ranks without the loss scale."""
        return self.comm.world_size * self._pre_scale * self.scaler.scale

    # ---- the rest ------------------------------------------------------------------------------------------
    def _drop_accumulated(self) -> None:
        """Checkpoints are of boundaries: an accumulation that one interrupts begins anew."""
        if self._downlink is not None:
            self._downlink.drain()
        self.schedule.clear()
        self._loss_sum, self._losses, self._tokens, self._backwards = 0.0, 0, 0, 0
        self._micro_backwards, self._by_script = 0, False
        self._accumulating_since = self.micro_steps

    if not TYPE_CHECKING:  # which would take every slip for an attribute of the module

        def __getattr__(self, name: str) -> Any:
            """What an engine does not have, its module may."""
            if name.startswith("__") or "module" not in self.__dict__:
                raise AttributeError(name)
            for own in ("_parameters", "_buffers", "_modules"):
                if name in self.__dict__[own]:
                    return self.__dict__[own][name]
            try:
                return getattr(self.__dict__["module"], name)
            except AttributeError:
                raise AttributeError(
                    f"neither the engine nor its module ({type(self.module).__name__}) has an attribute {name!r}"
                ) from None

    def detach(self) -> None:
        """Another engine takes the model over."""
        self.saver.leave()
        self.updates.detach()
        self.schedule.detach()
        self.gathering.detach()
        self.whole.detach()
        for _, parameter in self.frozen:
            unmark(parameter)
        for parameter in self._trained_before:
            parameter.requires_grad_(True)

    def finish(self) -> None:
        """The training is complete: last checkpoint, and the hub hears that this rank finished."""
        self.synchronize()
        self.settle_changes()
        self.steering.finish()


DeepSpeedEngine = Engine
"""DeepSpeed's name of it."""


def _tokens_in(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch: elements of input_ids, else of the first integer tensor of two dimensions; 0 when there
    is none."""
    candidates: Iterable[Any] = [named["input_ids"]] if "input_ids" in named else [*inputs, *named.values()]
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return math.prod(value.shape)
    return 0


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    return type(value).__name__
