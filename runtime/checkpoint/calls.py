"""What training scripts call an engine for about checkpoints, with DeepSpeed's names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint.manifest import Misnamed
from runtime.checkpoint.registered import Registered, checked
from runtime.checkpoint.saving import Options
from runtime.comm import Comm
from runtime.config import Resolved

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
    config: Resolved
    optimizer: ZeroOptimizer
    telemetry: Telemetry | NullTelemetry
    saver: Background
    steering: Steering
    whole: WholeModel
    registered: Registered
    client_state: dict[str, Any]
    last_checkpoint: Path | None
    global_steps: int
    _micro_backwards: int

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
        if self._micro_backwards:
            raise checkpoint.CheckpointError(
                "save_checkpoint() in the middle of an accumulation would lose its gradients: call it "
                "after the step() at "
                "which is_gradient_accumulation_boundary() was true"
            )
        self._engine().settle_changes()
        if client_state is not None:
            self.client_state = client_state
        with self.telemetry.span("checkpoint"):
            tag = self._agreed_tag(save_dir, tag)
            options = Options(latest=save_latest, with_frozen=not exclude_frozen_parameters)
            if wait:
                earlier = self.saver.settle_untold()
                engine, folder = self._engine(), Path(save_dir)
                self.last_checkpoint = checkpoint.save(engine, folder, tag, self.client_state, options)
                if earlier:  # only now: this may be a script's last one
                    raise checkpoint.CheckpointError(f"{earlier} (and {self.last_checkpoint} is complete)")
            else:
                self.last_checkpoint = self.saver.begin(Path(save_dir), tag, self.client_state, options=options)
        return True

    def _agreed_tag(self, save_dir: str | Path, tag: Any) -> str:
        """One tag for all ranks. Raises CheckpointError on all of them for what can't be written to, or for different
        tags where the config wants that (checkpoint.tag_validation)."""
        mine = checkpoint.script_tag(self.global_steps) if tag in (None, "") else str(tag)
        problem = ""
        if save_dir is None or not str(save_dir):
            problem = f"save_checkpoint(save_dir={save_dir!r}): expected a folder"
        elif mine.startswith(".") or "/" in mine or "\0" in mine:
            problem = (
                f"save_checkpoint(tag={mine!r}): expected the name of a folder in {save_dir}, without / or a dot first"
            )
        told = self.comm.gather_objects([problem, mine])
        if problems := [found for found, _ in told if found]:
            raise Misnamed(problems[0])
        first = str(told[0][1])
        different = next((f"{other!r} on rank {rank}" for rank, (_, other) in enumerate(told) if other != first), "")
        validation = self.config.tag_validation
        if different and validation != "ignore":
            text = f"save_checkpoint(tag=...): the ranks say different tags, {first!r} on rank 0 and {different}"
            if validation == "fail":
                raise checkpoint.CheckpointError(f"{text} (checkpoint.tag_validation is Fail)")
            if self.comm.rank == 0:
                log.warning(f"{text}: rank 0's is taken")
        return first

    def wait_for_checkpoint(self) -> None:
        """Returns when what `save_checkpoint(..., wait=False)` began is complete; every rank must call it. Raises
        CheckpointError on every rank if any could not write."""
        if problem := self.saver.settle_untold():
            raise checkpoint.CheckpointError(problem)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Rank 0 writes the module's state_dict, as it computes, to SAVE_DIR/SAVE_FILENAME; every rank must call it.
        exclude_frozen_parameters: leave out what is not trained."""
        path = Path(save_dir) / save_filename
        state = self._engine()._consolidated_16bit_state_dict(exclude_frozen_parameters)

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
        if tag is not None:
            path: Path | None = Path(load_dir) / str(tag)
            self.resume_from(Path(load_dir) / str(tag), wanted)
        else:
            path = self.resume_newest(Path(load_dir), wanted)
        if path is not None and custom_load_fn is not None:
            self._load_module_by(custom_load_fn, path)
        return (None, {}) if path is None else (str(path), self.client_state)

    def _load_module_by(self, load: Callable[..., Any], path: Path) -> None:
        from runtime.checkpoint.reading import CheckpointReader

        reader = CheckpointReader(path)
        source = {stored.name: reader.read(stored, stored.dtype) for stored in reader.tensors}
        with self.whole.gathered(self.whole.units, modifier_rank=0):
            load(src=source, dst=self.module)

    def resume_newest(
        self,
        folder: Path,
        wanted: checkpoint.Wanted = checkpoint.EVERYTHING,
        tell: Callable[[str], None] = log.error,
    ) -> Path | None:
        """Load the newest complete checkpoint in `folder` that is sound; None when there is none. tell: hears, on rank
        0, which ones are damaged and passed over."""
        found = [entry.path.name for entry in checkpoint.complete(folder) if entry.latest]
        for path in (folder / name for name in reversed(self.comm.broadcast_object(found))):
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
