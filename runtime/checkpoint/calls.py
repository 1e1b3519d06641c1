"""What training scripts call an engine for about checkpoints, with DeepSpeed's names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint.registered import Registered, checked
from runtime.comm import Comm

if TYPE_CHECKING:
    from runtime.checkpoint.background import Background
    from runtime.engine import Engine
    from runtime.optim.optimizer import ZeroOptimizer
    from runtime.steer import Steering
    from runtime.telemetry import NullTelemetry, Telemetry
    from runtime.zero.whole import WholeModel

log = logging.getLogger("runtime.engine")


class CheckpointCalls:
    """The part of `Engine` that saves and loads."""

    module: nn.Module
    comm: Comm
    optimizer: ZeroOptimizer
    telemetry: Telemetry | NullTelemetry
    saver: Background
    steering: Steering
    whole: WholeModel
    registered: Registered
    client_state: dict[str, Any]
    last_checkpoint: Path | None
    global_steps: int
    _losses: int

    def _refuse_after_failure(self) -> None:
        raise NotImplementedError

    def _drop_accumulated(self) -> None:
        raise NotImplementedError

    def _engine(self) -> Engine:
        return cast("Engine", self)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        wait: bool = True,
    ) -> bool:
        """Write SAVE_DIR/TAG (default tag: step-NNNNNNNN); every rank must call it. client_state: plain data and
        tensors. save_latest: accepted and not needed: SAVE_DIR/latest names the newest complete one at all times.
        wait=False: returns when a copy is made, and a process of low priority writes it; `wait_for_checkpoint()` waits
        for that, and so does the next save, which raises what went wrong with it.

        Raises CheckpointError on every rank if any could not write, or in the middle of an accumulation, whose
        gradients a checkpoint does not hold.
        """
        if not self.optimizer.trains:
            raise checkpoint.CheckpointError(
                "save_checkpoint(): this engine has no optimizer, so there is nothing to continue from; "
                "save_16bit_model() writes its weights"
            )
        if self._losses:
            raise checkpoint.CheckpointError(
                "save_checkpoint() in the middle of an accumulation would lose its gradients: call it "
                "after the step() at "
                "which is_gradient_accumulation_boundary() was true"
            )
        if client_state is not None:
            self.client_state = client_state
        with self.telemetry.span("checkpoint"):
            tag = str(tag or checkpoint.step_tag(self.global_steps))
            if wait:
                earlier = self.saver.settle_untold()
                self.last_checkpoint = checkpoint.save(self._engine(), Path(save_dir), tag, self.client_state)
                if earlier:  # only now: this may be a script's last one
                    raise checkpoint.CheckpointError(f"{earlier} (and {self.last_checkpoint} is complete)")
            else:
                self.last_checkpoint = self.saver.begin(Path(save_dir), tag, self.client_state)
        return True

    def wait_for_checkpoint(self) -> None:
        """Returns when what `save_checkpoint(..., wait=False)` began is complete; every rank must call it. Raises
        CheckpointError on every rank if any could not write."""
        if problem := self.saver.settle_untold():
            raise checkpoint.CheckpointError(problem)

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        """Rank 0 writes the module's state_dict, as it computes, to SAVE_DIR/SAVE_FILENAME; every rank must call it."""
        path = Path(save_dir) / save_filename
        with self.whole.without_values(needed=self.comm.rank == 0):
            state = self.module.state_dict()  # collective at stage 3

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)

        checkpoint.on_rank_0(self.comm, f"write {path}", write)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load LOAD_DIR/TAG, or the newest complete checkpoint in LOAD_DIR that is sound. Returns (its path,
        client_state), or (None, {}) when there is none.

        load_module_strict=False: parameters and buffers that only the model or only the checkpoint has are left alone.
        load_optimizer_states=False: the optimizer's states and learning rates stay as they are;
        load_lr_scheduler_states=False: the scheduler does. load_module_only: parameters and buffers and nothing else,
        no step counts either; an engine without an optimizer always loads so.
        """
        load_module_only = load_module_only or not self.optimizer.trains
        wanted = checkpoint.Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
        )
        if tag is not None:
            path: Path | None = Path(load_dir) / str(tag)
            self.resume_from(Path(load_dir) / str(tag), wanted)
        else:
            path = self.resume_newest(Path(load_dir), wanted)
        return (None, {}) if path is None else (str(path), self.client_state)

    def resume_newest(
        self,
        folder: Path,
        wanted: checkpoint.Wanted = checkpoint.EVERYTHING,
        tell: Callable[[str], None] = log.error,
    ) -> Path | None:
        """Load the newest complete checkpoint in `folder` that is sound; None when there is none. tell: hears, on rank
        0, which ones are damaged and passed over."""
        found = [entry.path for entry in checkpoint.complete(folder)]
        for path in reversed(self.comm.broadcast_object(found)):
            try:
                self.resume_from(path, wanted)
            except checkpoint.Damaged as error:
                if self.comm.rank == 0:
                    tell(f"{error}: the one before it is taken")
                continue
            return path
        return None

    def resume_from(self, path: Path, wanted: checkpoint.Wanted = checkpoint.EVERYTHING) -> None:
        """Load the checkpoint at `path`; objects that are registered later get their states then."""
        self._refuse_after_failure()
        loaded = checkpoint.load(self._engine(), path, wanted)
        self.client_state = loaded.client_state
        self.last_checkpoint = path
        self.steering.forget_saved()
        if wanted.progress:
            self._drop_accumulated()
        self.registered.restore(loaded.registered, loaded.generators)

    def register_state(self, **items: Any) -> None:
        """What checkpoints shall include, also keyboard ones: objects with state_dict() and load_state_dict() (a
        sampler, a metric), which are taken for equal on all ranks; and generators of random numbers (torch.Generator,
        numpy's Generator and RandomState, random.Random), of which each rank's is kept. In a larger world, a rank that
        is new leaves a generator as it is, unless all ranks that saved (two or more) had it in the same state.

        Where a checkpoint has been loaded that holds them (under --resume: by initialize()), they are restored here.
        The loader that initialize() returns needs no registering."""
        for name, item in items.items():
            self.registered.add(checked(name), item)
