"""The engine: DeepSpeed's API around a training state.

engine, optimizer, loader, scheduler = initialize(model=model, config="config.json")
loss = engine(inputs, targets)     forward
engine.backward(loss)              accumulates gradients in flat buffers; complete units are reduced meanwhile
engine.step()                      at the boundary: sync norm and commands, clip, update, all-gather
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint.checkpointer import Checkpointer
from runtime.checkpoint.content.registered import check_name
from runtime.checkpoint.optimizer_states import load_optimizer_state, optimizer_state
from runtime.checkpoint.saving.job import SaveOptions
from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.checkpoint.tag_validation import validate_place
from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine import model_io, registry
from runtime.engine.activation_samples import ActivationSamples
from runtime.engine.autosave import Autosave
from runtime.engine.batch import count_tokens, describe
from runtime.engine.build import build_state
from runtime.engine.control import Control, knobs_of
from runtime.engine.nonfinite import NonFiniteSteps
from runtime.engine.queries import EngineQueries
from runtime.engine.release import DeviceMemoryRelease
from runtime.engine.report import Reporter
from runtime.engine.session import Session
from runtime.engine.step import OptimizerSteps
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.precision import note_wide_buffers
from runtime.zero.param_places import mark, unmark
from runtime.zero.partition_parameters import install_attributes
from runtime.zero.script_backward import ScriptBackward, engine_backward


class Engine(EngineQueries):
    """One rank's part of a training run, created by `initialize`. A module around the model, whose names in
    named_parameters() and state_dict() are the model's. Without an optimizer it evaluates but does not train.
    """

    def __init__(
        self, module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm, session: Session
    ) -> None:
        registry.detach_owner(module)  # detach an earlier engine on the same model
        registry.check_unowned(module)
        trained_before = [p for p in module.parameters() if p.requires_grad and not optimizer.trains]
        for parameter in module.parameters():
            unmark(parameter)  # zero.Init marks parameters as sharded, which they are only at stage 3
        script_backward = ScriptBackward()
        guard = SnapshotGuard()
        state = build_state(module, config, optimizer, comm, guard, script_backward.begin)
        super().__init__(state, session)
        self.telemetry = session.recorder
        self._trained_before = trained_before
        """Parameters whose requires_grad an evaluating engine has cleared, and restores when it detaches."""
        self.guard, self._script_backward = guard, script_backward
        script_backward.bind(self)
        self.checkpointer = Checkpointer(state, self.script, guard, session.run, session.attempt, session.number)
        self.memory = DeviceMemoryRelease(state, guard)
        knobs = knobs_of(state)
        self.autosave = Autosave(state, self.checkpointer, self.script, session, knobs)
        self.nonfinite = NonFiniteSteps(comm, session.link, config.precision == "fp16", self.autosave.newest)
        self.control = Control(state, session, knobs, self.autosave, self.nonfinite, self.memory)
        reporter = Reporter(state, session.recorder, knobs)
        self._samples = ActivationSamples(state, session.recorder)
        self.steps = OptimizerSteps(state, session.recorder, self.control, self.nonfinite, reporter, self._samples)
        registry.register(module, self)
        if state.policy.shards_parameters:
            install_attributes()
            for _, parameter in state.frozen:
                mark(parameter)
        optimizer.bind(self)
        counters = state.counters
        session.step = lambda: counters.global_steps

    # ---- forward, backward, step -----------------------------------------------------------------------------------
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the model's forward. Telemetry counts everything until backward() as forward."""
        self.memory.check("forward()", ("parameters", "buffers"))
        if self.module.training and torch.is_grad_enabled():
            self.telemetry.enter("forward", self.global_steps + 1, self._micro_step)
            self.tput_timer.start()
            self.state.accumulation.tokens += count_tokens(inputs, named)
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
        """Run the backward of one micro-step. `loss`: a scalar, the mean over this micro-batch; the engine averages
        over micro-steps and ranks. Several calls before one step() add up.

        scale_wrt_gas: divide the loss by gradient_accumulation_steps(); pass False if the script has done so. Returns
        the divided loss. Raises ValueError if `loss` is not a scalar that requires grad. After any other exception the
        engine cannot continue, because collectives in flight on this rank no longer match the other ranks'.
        """
        state, accumulation = self.state, self.state.accumulation
        accumulation.check_can_train("backward(loss)")
        self.memory.check("backward(loss)")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"engine.backward(loss): expected a scalar tensor that requires grad, got {describe(loss)}"
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
            if state.unsharder.units and "storage of size 0" in str(error):  # torch's message for freed storage
                raise RuntimeError(
                    "stage 3: backward used parameters of a unit that had been resharded, because autograd reached the "
                    "unit without passing its hooks (as a double backward with create_graph=True and torch.func.vmap "
                    "do). Use zero_optimization.stage 2 for this model, or run forward and backward inside "
                    "zero.GatheredParameters"
                ) from error
            raise
        accumulation.end_backward(loss, self.gradient_accumulation_steps())
        return loss / steps

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply the loss by the loss scale, for scripts that call .backward() on it themselves."""
        self.state.settle_step()
        self.state.accumulation.loss_is_scaled = True
        return loss * self.state.scaler.scale

    def _begin_backward(self, factor: float = 1.0) -> None:
        """factor: multiplied into each gradient on arrival."""
        state, accumulation = self.state, self.state.accumulation
        self.telemetry.enter("backward", self.global_steps + 1, self._micro_step)
        if self.config.precision == "fp16":
            state.settle_step()  # the loss scale follows from the last step
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
        """Prepare for a backward that the script starts with loss.backward(): see zero/script_backward.py."""
        accumulation = self.state.accumulation
        accumulation.check_not_failed(self.global_steps + 1)
        if self.config.precision == "fp16" and not accumulation.loss_is_scaled:
            raise RuntimeError(
                "loss.backward() under fp16 does not apply the loss scale, so small gradients would underflow: call "
                "engine.backward(loss), or engine.scale(loss).backward()"
            )
        scale = 1.0 if accumulation.loss_is_scaled else self.state.scaler.scale
        self._begin_backward(scale / self.gradient_accumulation_steps())

    def end_script_backward(self, loss: torch.Tensor | None) -> None:
        """Finish a backward that the script started. loss: the output of the last forward, if that was a loss."""
        self._end_backward()
        self.state.accumulation.end_backward(loss, self.gradient_accumulation_steps(), by_script=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard gradients of a loss.backward() that the script ran itself and no step() has used (such as another
        engine's loss that depends on this model). Otherwise does nothing, on purpose: step() clears the gradients, and
        scripts written for DeepSpeed call this between micro-steps, where clearing would lose gradients."""
        if self.state.accumulation.check_zero_grad():
            self.state.discard_accumulated()

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-step; at the boundary also run the optimizer step and apply pending commands.

        lr_kwargs: keyword arguments for the scheduler's step(). Raises RunStopped (a SystemExit) after a `stop`
        command, once its checkpoint is complete.
        """
        accumulation = self.state.accumulation
        accumulation.check_can_train("step()")
        accumulation.check_not_failed(self.global_steps + 1)
        boundary = accumulation.check_step(self.gradient_accumulation_steps())
        accumulation.end_micro_step()
        self._stepped = boundary
        if boundary:
            self.steps.take(lr_kwargs or {})
        else:
            self.telemetry.enter("data", self.global_steps + 1, self._micro_step)
        self.tput_timer.stop(global_step=boundary)

    # ---- accumulation ----------------------------------------------------------------------------------------------
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Override the counting of micro-steps from the next backward() on, until the next call: whether a micro-step
        is the boundary. The loss is still divided by gradient_accumulation_steps()."""
        self.state.accumulation.force_boundary(bool(is_boundary))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which backwards only accumulate locally, in unsharded buffers at every stage; the next backward
        outside reduces everything."""
        with self.state.accumulation.no_sync():
            yield

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group, until a scheduler changes it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the number of micro-steps per optimizer step to reach this global batch; the micro-batch is
        unchanged."""
        micro, world = self.config.micro_batch, self.comm.world_size
        if train_batch_size <= 0 or train_batch_size % (micro * world):
            raise ValueError(
                f"engine.set_train_batch_size({train_batch_size}): expected a multiple of {micro * world}, "
                f"train_micro_batch_size_per_gpu ({micro}) x ranks ({world})"
            )
        self._set_batch(micro, train_batch_size // (micro * world), "engine.set_train_batch_size()")

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the size of the script's micro-batches; the number of micro-steps is unchanged. A loader that
        initialize() has returned keeps its batch size."""
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
        self.tput_timer.batch_size = total

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
        """Write SAVE_DIR/TAG (default tag: global_stepN). Collective. client_state: plain data and tensors.
        save_latest=False: neither SAVE_DIR/latest nor a load_checkpoint() without a tag counts it as the newest.
        exclude_frozen_parameters: leave out parameters that are not trained; loading then needs a model with the same
        base weights. wait=False: return once a copy is made, which a low-priority process writes;
        `wait_for_checkpoint()` and the next save wait for it and raise its failure. The checkpoint of an engine without
        an optimizer holds parameters and buffers only.

        Raises CheckpointError on every rank if any rank fails to write (also a ValueError for a folder or tag that
        can't be one); in the middle of an accumulation, as checkpoints hold no gradients; and if ranks pass different
        folders or tags with checkpoint.tag_validation "Fail" (otherwise rank 0's are used).
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
            folder, tag = validate_place(self.comm, save_dir, tag, self.global_steps, self.config.tag_validation)
            options = SaveOptions(latest=save_latest, with_frozen=not exclude_frozen_parameters)
            state = self.script.client_state
            if wait:
                earlier = self.checkpointer.wait_for_unreported()
                self.script.last_checkpoint = self.checkpointer.save(folder, tag, state, options)
                if earlier:  # raised after this save: it may be the script's last
                    raise checkpoint.CheckpointError(f"{earlier} (and {self.script.last_checkpoint} is complete)")
            else:
                self.script.last_checkpoint = self.checkpointer.begin(folder, tag, state, options=options)
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait for a `save_checkpoint(..., wait=False)`. Collective. Raises CheckpointError on every rank if any rank
        failed to write."""
        if problem := self.checkpointer.wait_for_unreported():
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
        """Load LOAD_DIR/TAG, or the newest complete, undamaged checkpoint in LOAD_DIR. Returns (its path,
        client_state), or (None, {}) if there is none. Collective.

        load_module_strict=False: ignore parameters and buffers that only the model or only the checkpoint has.
        load_optimizer_states=False: keep the current optimizer states and learning rates.
        load_lr_scheduler_states=False: keep the scheduler's state. load_module_only: load parameters and buffers only,
        not even step counts; an engine without an optimizer always does. custom_load_fn(src=, dst=): copies the
        checkpoint's unsharded parameters and buffers (src, by name, in host memory) into the module (dst) itself; rank
        0's result is broadcast, and master weights are set from it in the module's precision.
        """
        load_module_only = load_module_only or not self.optimizer.trains
        options = checkpoint.LoadOptions(
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
            self.checkpointer.load(path, options)
        else:
            path = self.checkpointer.load_newest(Path(load_dir), options)
        if path is None:
            return None, {}
        self.control.forget_saved()
        if custom_load_fn is not None:
            model_io.load_with(custom_load_fn, path, self.state.full)
        return str(path), self.script.client_state

    def resume(self) -> Path | None:
        """Under --resume: load the newest complete, undamaged checkpoint of the run. Returns its path, or None."""
        path = self.autosave.resume() if self.session.resume else None
        self.control.knobs["lr_factor"] = self.state.counters.lr_factor
        return path

    def register_state(self, **items: Any) -> None:
        """Add objects to every checkpoint, keyboard ones included. Objects with state_dict() and load_state_dict() (a
        sampler, a metric) are saved from rank 0; random number generators (torch.Generator, numpy's Generator and
        RandomState, random.Random) from each rank. At a larger world size, an additional rank keeps its own generator
        state, unless all saved ranks (two or more) had the same.

        If the loaded checkpoint (under --resume: the one that initialize() loads) holds their states, they are restored
        here. The loader that initialize() returns is registered already."""
        for name, item in items.items():
            self.script.registered.add(check_name(name), item)

    # ---- the unsharded model ---------------------------------------------------------------------------------------
    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's full state_dict; at stage 3 copies in host memory, and collective."""
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
        """Load the model's weights and update the master weights. Collective.

        checkpoint: {"module": state_dict}, or the state_dict itself. custom_load_fn(src=state_dict, dst=model): loads
        it instead, with unsharded parameters. fetch_z3_params: ignored.
        """
        values = checkpoint["module"] if isinstance(checkpoint.get("module"), Mapping) else checkpoint
        if custom_load_fn is None:
            self.load_state_dict(values, strict=strict)
            return
        full = self.state.full
        with self.state.unsharder.unsharded():
            custom_load_fn(src=values, dst=self.module)
            full.commit_changes(full.units)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The model's full state_dict on rank 0, None elsewhere; accelerate's get_state_dict calls it. Collective."""
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
        """Write the model's full state_dict in its compute dtype to SAVE_DIR/SAVE_FILENAME, from rank 0. Collective.
        exclude_frozen_parameters: leave out parameters that are not trained."""
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
        """Move the engine's states to host memory until reload_states(), so that something else can use the GPU's
        memory between two optimizer steps. Call it on every rank.

        include: some of optim_states, hp_params, lp_params, lp_grads, contiguous_grad_buffer; default: all. device:
        "cpu". pin_memory and non_blocking: ignored; the copies are complete on return.
        """
        self.state.accumulation.check_boundary(
            "engine.offload_states()",
            ": call it after the step() at which is_gradient_accumulation_boundary() was true",
        )
        self.memory.release(model_io.categories(include, device))

    def reload_states(self, non_blocking: bool = False) -> None:
        """Move back what offload_states() moved. non_blocking: ignored; the copies are complete on return."""
        self.memory.restore()

    def empty_partition_cache(self) -> None:
        """Reshard units that are still unsharded (the root unit). Call it between forward and backward passes."""
        self.state.unsharder.reshard_all()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def optimizer_state_dict(self) -> dict[str, Any]:
        """The implementation of ZeroOptimizer.state_dict."""
        return optimizer_state(self.state)

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """The implementation of ZeroOptimizer.load_state_dict."""
        load_optimizer_state(self.state, self.guard, state)

    # ---- compilation, and the end ----------------------------------------------------------------------------------
    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """Let torch compile the model at its next forward."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Detach the engine from its model, which becomes an ordinary, unsharded module on every rank. Collective."""
        registry.detach_owner(self.module)

    def detach(self) -> None:
        """Remove all hooks and unshard the model; called by `destroy` and when another engine takes the model."""
        state = self.state
        self.checkpointer.leave()
        self._samples.detach()
        state.updates.detach()
        state.reducer.detach()
        state.unsharder.detach()
        state.full.detach()
        for _, parameter in state.frozen:
            unmark(parameter)
        for parameter in self._trained_before:
            parameter.requires_grad_(True)

    def finish(self) -> None:
        """End the training: make the last checkpoint and tell the hub that this rank has finished."""
        self.synchronize()
        self.steps.finish()
        self.state.settle_changes()
        self.control.finish()


DeepSpeedEngine = Engine
"""DeepSpeed's name for `Engine`."""
