"""The engine: DeepSpeed's calls around a training state.

engine, optimizer, loader, scheduler = initialize(model=model, config="config.json")
loss = engine(inputs, targets)     forward
engine.backward(loss)              gradients land in flat buffers; complete units are reduced meanwhile
engine.step()                      at the end of an accumulation: agree on norm and commands, clip, update, all-gather
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint.checkpointer import Checkpointer
from runtime.checkpoint.job import Options
from runtime.checkpoint.optimizer_states import load_optimizer_state, optimizer_state
from runtime.checkpoint.registered import checked
from runtime.checkpoint.snapshot import SnapshotGuard
from runtime.checkpoint.tag import agreed_tag
from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine import model_io, registry
from runtime.engine.autosave import Autosave
from runtime.engine.build import build_state
from runtime.engine.control import Control, knobs_of
from runtime.engine.nonfinite import NonFiniteSteps, TrainingError
from runtime.engine.queries import EngineQueries
from runtime.engine.release import DeviceMemoryRelease
from runtime.engine.report import Reporter
from runtime.engine.session import Session
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.loss_scale import ScaleExhausted
from runtime.state.precision import note_wide_buffers
from runtime.zero.partition_parameters import install_attributes
from runtime.zero.places import mark, unmark
from runtime.zero.script_backward import ScriptBackward, engine_backward
from runtime.zero.step_stats import clip_coefficient, sync_step_stats


class Engine(EngineQueries):
    """One rank's part of a training run. Made by `initialize`.

    Hooks on it run around every forward. Names in its named_parameters() and state_dict() are the model's. Without an
    optimizer it computes and does not train.
    """

    def __init__(
        self, module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm, session: Session
    ) -> None:
        registry.release(module)  # an earlier engine on the same model must not go on taking its gradients
        trained_before = [p for p in module.parameters() if p.requires_grad and not optimizer.trains]
        for parameter in module.parameters():
            unmark(parameter)  # zero.Init marks what it builds; below stage 3 nothing is sharded
        script_backward = ScriptBackward()
        guard = SnapshotGuard()
        state = build_state(module, config, optimizer, comm, guard, script_backward.begins)
        super().__init__(state, session)
        self.telemetry = session.recorder
        self._trained_before = trained_before
        """An engine without an optimizer keeps no gradients: what it holds requires one again when it lets go."""
        self.guard, self._script_backward = guard, script_backward
        script_backward.bind(self)
        self.checkpointer = Checkpointer(state, self.script, guard, session.run, session.attempt, session.number)
        self.memory = DeviceMemoryRelease(state, guard)
        knobs = knobs_of(state)
        self.autosave = Autosave(state, self.checkpointer, self.script, session, knobs)
        self.nonfinite = NonFiniteSteps(comm, session.link, config.precision == "fp16")
        self.control = Control(state, session, knobs, self.autosave, self.nonfinite, self.memory)
        self._reporter = Reporter(state, session.recorder, knobs)
        registry.hold(module, self)
        if state.policy.shards_parameters:
            install_attributes()
            for _, parameter in state.frozen:
                mark(parameter)
        optimizer.bind(self)
        counters = state.counters
        session.step = lambda: counters.global_steps

    # ---- forward, backward, step -----------------------------------------------------------------------------------
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward. Its phase in telemetry lasts until backward() begins."""
        self.memory.check("forward()", ("parameters", "buffers"))
        if self.module.training and torch.is_grad_enabled():
            self.telemetry.enter("forward", self.global_steps + 1, self._micro_step)
            self.state.accumulation.tokens += _tokens_in(inputs, named)
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
        state, accumulation = self.state, self.state.accumulation
        accumulation.check_can_train("backward(loss)")
        self.memory.check("backward(loss)")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"engine.backward(loss): expected a scalar tensor that requires grad, got {_describe(loss)}"
            )
        accumulation.check_not_failed(self.global_steps + 1)
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        try:
            with engine_backward():
                self._begin_backward()
                (loss * (state.scaler.scale / steps)).backward(retain_graph=retain_graph)
                self._end_backward()
        except BaseException as error:
            state.reducer.abandon()
            accumulation.fail(
                f"engine.backward(loss) at step {self.global_steps + 1} ended with {type(error).__name__}"
            )
            if state.unsharder.units and "storage of size 0" in str(error):  # torch's words for memory that was freed
                raise RuntimeError(
                    "stage 3: backward reached parameters of a unit that was resharded: its forward's results came "
                    "back by a way that no hook sees (a backward through a backward, create_graph=True, does that). "
                    "Use zero_optimization.stage 2 for this model, or hold the units in zero.GatheredParameters "
                    "meanwhile"
                ) from error
            raise
        accumulation.end_backward(loss, self.gradient_accumulation_steps())
        return loss / steps

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for scripts that call .backward() on it themselves."""
        self.state.accumulation.loss_is_scaled = True
        return loss * self.state.scaler.scale

    def _begin_backward(self, factor: float = 1.0) -> None:
        """factor: on each gradient that arrives."""
        state, accumulation = self.state, self.state.accumulation
        self.telemetry.enter("backward", self.global_steps + 1, self._micro_step)
        boundary = self.is_gradient_accumulation_boundary()
        reduce = accumulation.syncs and (boundary or state.policy.shards_gradients)
        state.updates.drain()
        accumulation.begin_backward()
        state.reducer.begin_backward(reduce, accumulation.syncs and boundary, factor)

    def _end_backward(self) -> None:
        self.state.reducer.end_backward()
        self.state.updates.check()
        self.state.unsharder.end_backward()

    def begin_script_backward(self) -> None:
        """The script has called .backward() on its loss: see zero/script_backward.py."""
        accumulation = self.state.accumulation
        accumulation.check_not_failed(self.global_steps + 1)
        if self.config.precision == "fp16" and not accumulation.loss_is_scaled:
            raise RuntimeError(
                "loss.backward() under fp16 goes without the loss scale, so small gradients would become zero: call "
                "engine.backward(loss), or engine.scale(loss).backward()"
            )
        scale = 1.0 if accumulation.loss_is_scaled else self.state.scaler.scale
        self._begin_backward(scale / self.gradient_accumulation_steps())

    def end_script_backward(self, loss: torch.Tensor | None) -> None:
        """The script's backward is over. loss: what the last forward returned, where that was a loss."""
        self._end_backward()
        self.state.accumulation.end_backward(loss, self.gradient_accumulation_steps(), by_script=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients of a loss.backward() that the script ran itself and no step() has taken (another
        engine's loss that came through this model). Otherwise nothing, on purpose: a step() uses the gradients and
        discards them, and scripts written for DeepSpeed call this between the micro-steps of one accumulation, where
        clearing would lose gradients."""
        if self.state.accumulation.check_zero_grad():
            self.state.discard_accumulated()

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End of a micro-step; at the boundary also the optimizer step, and commands that wait are applied.

        lr_kwargs: keyword arguments for the scheduler's step(). Leaves with RunStopped (a SystemExit) after a `stop`
        command, once its checkpoint is complete.
        """
        accumulation = self.state.accumulation
        accumulation.check_can_train("step()")
        accumulation.check_not_failed(self.global_steps + 1)
        boundary = accumulation.check_step(self.gradient_accumulation_steps())
        accumulation.end_micro_step()
        self._stepped = False
        if boundary:
            self._optimizer_step(lr_kwargs or {})
        else:
            self.telemetry.enter("data", self.global_steps + 1, self._micro_step)

    def _optimizer_step(self, lr_kwargs: Mapping[str, Any]) -> None:
        """Agree (norm, loss, commands) -> clip -> update each unit and all-gather it -> report -> commands."""
        state, optimizer = self.state, self.state.optimizer
        optimizer.check_groups()
        state.changes.check()
        self.telemetry.enter("step", self.global_steps + 1, self.gradient_accumulation_steps())
        state.settle_gradients()
        divisor, loss = state.gradient_divisor, state.accumulation.loss
        stats = sync_step_stats(
            state.flats,
            state.comm,
            loss,
            divisor,
            command_waits=self.control.command_waits(),
            stop_asked=self.control.stop_asked(),
            execution_hash=state.unsharder.take_execution_hash(),
            changed=state.changes.found(),
        )
        if stats.changed:
            state.changes.take()
        groups = optimizer.numbers(state.counters.lr_factor)
        skipped = not math.isfinite(stats.grad_norm)
        if not skipped:
            state.update(groups, clip_coefficient(stats.grad_norm, self.config.gradient_clipping) / divisor)
        state.reducer.clear()
        state.counters.global_steps += 1
        self._stepped, self._norm = not skipped, stats.grad_norm
        result = self._reporter.report(stats, groups[0]["lr"], skipped)
        self.nonfinite.report(result, loss)
        self._rescale(skipped)
        if state.lr_scheduler is not None and not skipped:
            optimizer.mark_stepped()
            state.lr_scheduler.step(**lr_kwargs)
        state.accumulation.end_step()
        self.control.at_boundary(stats)
        self.telemetry.enter("data", self.global_steps + 1, 0)
        self._reporter.begin_step()

    def _rescale(self, overflow: bool) -> None:
        """fp16: the next loss scale. Raises TrainingError when it can't be lowered any more."""
        try:
            self.state.scaler.update(overflow)
        except ScaleExhausted as error:
            raise TrainingError(f"step {self.global_steps}: {error}") from None

    def synchronize(self) -> None:
        """Returns when the last step's update is complete, for scripts that read parameters or states themselves: with
        offload it may still be under way after step()."""
        self.state.synchronize()

    # ---- accumulation ----------------------------------------------------------------------------------------------
    @property
    def _micro_step(self) -> int:
        return self.state.accumulation.micro_step(self.gradient_accumulation_steps())

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-step under way is the accumulation's last."""
        return self.state.accumulation.is_boundary(self.gradient_accumulation_steps())

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From the next backward() on, until the next such call: whether the micro-step is the accumulation's last,
        instead of counting. The loss is still divided by gradient_accumulation_steps()."""
        self.state.accumulation.forced_boundary = bool(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate on this rank, in whole buffers at every stage; the next one outside reduces
        them all."""
        with self.state.accumulation.no_sync():
            yield

    def set_lr(self, lr: float) -> None:
        """The learning rate of every parameter group, until a scheduler changes it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Another number of micro-steps per step, from the next one on; the micro-batch stays what it is."""
        micro, world = self.config.micro_batch, self.comm.world_size
        if train_batch_size <= 0 or train_batch_size % (micro * world):
            raise ValueError(
                f"engine.set_train_batch_size({train_batch_size}): expected a multiple of {micro * world}, which is "
                f"{micro} in each micro-batch times {world} ranks"
            )
        self._set_batch(micro, train_batch_size // (micro * world), "engine.set_train_batch_size()")

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """What the micro-batches of the script hold from now on; the number of micro-steps stays what it is. A loader
        that initialize() made goes on with the size that it has."""
        if micro_batch_size <= 0:
            raise ValueError(f"engine.set_train_micro_batch_size({micro_batch_size}): expected at least 1")
        self._set_batch(micro_batch_size, self.config.accumulation, "engine.set_train_micro_batch_size()")

    def _set_batch(self, micro: int, accumulation: int, call: str) -> None:
        self.state.accumulation.check_boundary(call, ": call it after the optimizer step")
        total = micro * accumulation * self.comm.world_size
        self.state.config = self.config.model_copy(
            update={"micro_batch": micro, "accumulation": accumulation, "global_batch": total}
        )
        self.state.accumulation.start = self.micro_steps

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Nothing to do: engine.backward(loss) has reduced them."""

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        wait: bool = True,
    ) -> bool:
        """Write SAVE_DIR/TAG (default tag: global_stepN); every rank must call it. client_state: plain data and
        tensors. save_latest=False: neither SAVE_DIR/latest nor a load_checkpoint() without a tag takes it for the
        newest. exclude_frozen_parameters: leave out what is not trained; who loads it needs a model with the same
        base weights. wait=False: returns when a copy is made, and a process of low priority writes it;
        `wait_for_checkpoint()` waits for that, and so does the next save, which raises what went wrong with it. That of
        an engine without an optimizer holds parameters and buffers, and whoever loads it gets no more.

        Raises CheckpointError on every rank if any could not write (for what can't be a folder or a tag one that is a
        ValueError, too), in the middle of an accumulation, whose gradients a checkpoint does not hold, or, with
        checkpoint.tag_validation "Fail", when the ranks say different tags; otherwise rank 0's is taken.
        """
        if exclude_frozen_parameters and not self.optimizer.trains:
            raise checkpoint.CheckpointError(
                "save_checkpoint(exclude_frozen_parameters=True): this engine has no optimizer and trains no "
                "parameter, so none would be saved"
            )
        if self.state.accumulation.in_progress:
            raise checkpoint.CheckpointError(
                "save_checkpoint() in the middle of an accumulation would lose its gradients: call it after the step() "
                "at which is_gradient_accumulation_boundary() was true"
            )
        self.state.settle_changes()
        if client_state is not None:
            self.script.client_state = client_state
        with self.telemetry.span("checkpoint"):
            tag = agreed_tag(self.comm, save_dir, tag, self.global_steps, self.config.tag_validation)
            options = Options(latest=save_latest, with_frozen=not exclude_frozen_parameters)
            folder, state = Path(save_dir), self.script.client_state
            if wait:
                earlier = self.checkpointer.settle_unreported()
                self.script.last_checkpoint = self.checkpointer.save(folder, tag, state, options)
                if earlier:  # only now: this may be a script's last one
                    raise checkpoint.CheckpointError(f"{earlier} (and {self.script.last_checkpoint} is complete)")
            else:
                self.script.last_checkpoint = self.checkpointer.begin(folder, tag, state, options=options)
        return True

    def wait_for_checkpoint(self) -> None:
        """Returns when what `save_checkpoint(..., wait=False)` began is complete; every rank must call it. Raises
        CheckpointError on every rank if any could not write."""
        if problem := self.checkpointer.settle_unreported():
            raise checkpoint.CheckpointError(problem)

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load LOAD_DIR/TAG, or the newest complete checkpoint in LOAD_DIR that is sound. Returns (its path,
        client_state), or (None, {}) when there is none.

        load_module_strict=False: parameters and buffers that only the model or only the checkpoint has are left alone.
        load_optimizer_states=False: the optimizer's states and learning rates stay as they are;
        load_lr_scheduler_states=False: the scheduler does. load_module_only: parameters and buffers and nothing else,
        no step counts either; an engine without an optimizer always loads so. custom_load_fn(src=, dst=): puts the
        checkpoint's whole parameters and buffers (src, by name, in host memory) into the module (dst) in our stead;
        rank 0's result is everybody's, and masters become what it leaves in the module's precision.
        """
        load_module_only = load_module_only or not self.optimizer.trains
        wanted = checkpoint.Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
            module=custom_load_fn is None,
        )
        self.state.accumulation.check_not_failed(self.global_steps + 1)
        path: Path | None
        if tag is not None:
            path = Path(load_dir) / str(tag)
            self.checkpointer.load(path, wanted)
        else:
            path = self.checkpointer.load_newest(Path(load_dir), wanted)
        if path is None:
            return None, {}
        self.control.forget_saved()
        if custom_load_fn is not None:
            model_io.load_by(custom_load_fn, path, self.state.full)
        return str(path), self.script.client_state

    def resume(self) -> Path | None:
        """Under --resume: load the newest complete checkpoint of the run that is sound. Returns it."""
        path = self.autosave.resume() if self.session.resume else None
        self.control.knobs["lr_factor"] = self.state.counters.lr_factor
        return path

    def register_state(self, **items: Any) -> None:
        """What checkpoints shall include, also keyboard ones: objects with state_dict() and load_state_dict() (a
        sampler, a metric), which are taken for equal on all ranks; and generators of random numbers (torch.Generator,
        numpy's Generator and RandomState, random.Random), of which each rank's is kept. In a larger world, a rank that
        is new leaves a generator as it is, unless all ranks that saved (two or more) had it in the same state.

        Where a checkpoint has been loaded that holds them (under --resume: by initialize()), they are restored here.
        The loader that initialize() returns needs no registering."""
        for name, item in items.items():
            self.script.registered.add(checked(name), item)

    # ---- the model as a whole --------------------------------------------------------------------------------------
    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's state_dict; at stage 3 copies in host memory, and every rank must call it."""
        state: dict[str, Any] = self.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, parameter in self.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = False,
    ) -> None:
        """Load the model's weights, masters included; every rank must call it.

        checkpoint: {"module": state_dict}, or the state_dict itself. custom_load_fn(src=state_dict, dst=model) loads it
        in a way of its own, with the parameters whole. fetch_z3_params: accepted and not needed.
        """
        values = checkpoint["module"] if isinstance(checkpoint.get("module"), Mapping) else checkpoint
        if custom_load_fn is None:
            self.load_state_dict(values, strict=strict)
            return
        full = self.state.full
        with self.state.unsharder.unsharded():
            custom_load_fn(src=values, dst=self.module)
            full.take(full.units)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The model's state_dict on rank 0, None elsewhere; every rank must call it. (accelerate's get_state_dict)"""
        with self.state.full.without_values(needed=self.comm.rank == 0):
            state = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        return state if self.comm.rank == 0 else None

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Rank 0 writes the module's state_dict, as it computes, to SAVE_DIR/SAVE_FILENAME; every rank must call it.
        exclude_frozen_parameters: leave out what is not trained."""
        state = self._consolidated_16bit_state_dict(exclude_frozen_parameters)
        model_io.save(state, Path(save_dir) / save_filename, self.comm)
        return True

    save_fp16_model = save_16bit_model

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move the engine's states to host memory until reload_states(): while something else needs the GPU's memory,
        between two steps. Every rank must call it.

        include: some of optim_states, hp_params, lp_params, lp_grads, contiguous_grad_buffer; default: everything.
        device: "cpu". pin_memory and non_blocking: accepted and not needed; it has moved on return.
        """
        self.state.accumulation.check_boundary(
            "engine.offload_states()",
            ": call it after the step() at which is_gradient_accumulation_boundary() was true",
        )
        self.memory.release(model_io.categories(include, device))

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what offload_states() moved. non_blocking: accepted; it is there on return."""
        self.memory.restore()

    def empty_partition_cache(self) -> None:
        """Between two passes: free parameters of other ranks' shards that are still here (the root unit's)."""
        self.state.unsharder.reshard_all()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def masters(self) -> list[torch.Tensor]:
        """This rank's masters, (state shard,) fp32 of every trained parameter group in forward order; not copies."""
        self.synchronize()
        return [flat.masters for flat in self.state.flats]

    def optimizer_state_dict(self) -> dict[str, Any]:
        """See ZeroOptimizer.state_dict."""
        return optimizer_state(self.state)

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ZeroOptimizer.load_state_dict."""
        load_optimizer_state(self.state, self.guard, state)

    # ---- compilation, and the end ----------------------------------------------------------------------------------
    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """The model's forward is compiled by torch when it runs next."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """The engine lets go of its model, which is a plain one again, whole on every rank; every rank must call it."""
        registry.release(self.module)

    def detach(self) -> None:
        """Another engine takes the model over, or none."""
        state = self.state
        self.checkpointer.leave()
        state.updates.detach()
        state.reducer.detach()
        state.unsharder.detach()
        state.full.detach()
        for _, parameter in state.frozen:
            unmark(parameter)
        for parameter in self._trained_before:
            parameter.requires_grad_(True)

    def finish(self) -> None:
        """The training is complete: last checkpoint, and the hub hears that this rank finished."""
        self.synchronize()
        self.state.settle_changes()
        self.control.finish()

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
