"""What training scripts do with an engine's model and memory, with DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from runtime.comm import Comm
from runtime.config import ConfigError, Resolved
from runtime.engine.registry import release
from runtime.optim.optimizer import ZeroOptimizer
from runtime.wire.messages import Category

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.offload.parking import Parking
    from runtime.zero.full import WholeModel
    from runtime.zero.unshard import Gathering

STATES: dict[str, Category] = {
    "optim_states": "optimizer",
    "hp_params": "masters",
    "lp_params": "parameters",
    "lp_grads": "gradients",
    "contiguous_grad_buffer": "gradients",
}
"""DeepSpeed's names of what offload_states() can move, and ours."""


class ModuleCalls:
    """The part of `Engine` for who handles the model as a whole."""

    module: nn.Module
    config: Resolved
    comm: Comm
    optimizer: ZeroOptimizer
    whole: WholeModel
    parking: Parking
    gathering: Gathering
    micro_steps: int
    _micro_backwards: int
    _accumulating_since: int

    # ---- weights -----------------------------------------------------------------------------------------------------
    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's state_dict; at stage 3 copies in host memory, and every rank must call it."""
        engine = cast("Engine", self)
        state: dict[str, Any] = engine.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, parameter in engine.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
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
        state = checkpoint["module"] if isinstance(checkpoint.get("module"), Mapping) else checkpoint
        if custom_load_fn is None:
            cast("Engine", self).load_state_dict(state, strict=strict)
            return
        with self.whole.gathering.everything():
            custom_load_fn(src=state, dst=self.module)
            self.whole.take(self.whole.units)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The model's state_dict on rank 0, None elsewhere; every rank must call it. (accelerate's get_state_dict)"""
        with self.whole.without_values(needed=self.comm.rank == 0):
            state = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        return state if self.comm.rank == 0 else None

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict

    def save_fp16_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        """An old name of save_16bit_model."""
        return cast("Engine", self).save_16bit_model(save_dir, save_filename)

    # ---- memory ------------------------------------------------------------------------------------------------------
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
        if self._micro_backwards:
            raise RuntimeError(
                "engine.offload_states() in the middle of an accumulation: call it after the step() at which "
                "is_gradient_accumulation_boundary() was true"
            )
        if str(getattr(device, "value", device)) != "cpu":
            raise ConfigError(f'engine.offload_states(device={device!r}): expected "cpu"')
        if include is None:
            self.parking.park()
            return
        names = [str(getattr(state, "value", state)) for state in include]
        if unknown := [name for name in names if name not in STATES]:
            raise ConfigError(f"engine.offload_states(include={unknown}): expected some of {', '.join(STATES)}")
        self.parking.park({STATES[name] for name in names})

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what offload_states() moved. non_blocking: accepted; it is there on return."""
        self.parking.unpark()

    def empty_partition_cache(self) -> None:
        """Between two passes: free parameters of other ranks' shards that are still gathered (the root unit's)."""
        self.gathering.stale()
        if self.comm.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- changes while it trains -------------------------------------------------------------------------------------
    def set_lr(self, lr: float) -> None:
        """Of every parameter group, until a scheduler changes it."""
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
        self._set_batch(micro, train_batch_size // (micro * world), "set_train_batch_size()")

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """What the micro-batches of the script hold from now on; the number of micro-steps stays what it is. A loader
        that initialize() made goes on with the size that it has."""
        if micro_batch_size <= 0:
            raise ValueError(f"engine.set_train_micro_batch_size({micro_batch_size}): expected at least 1")
        self._set_batch(micro_batch_size, self.config.accumulation, "set_train_micro_batch_size()")

    def _set_batch(self, micro: int, accumulation: int, call: str) -> None:
        if self._micro_backwards:
            raise RuntimeError(f"engine.{call} in the middle of an accumulation: call it after the optimizer step")
        total = micro * accumulation * self.comm.world_size
        self.config = self.config.model_copy(
            update={"micro_batch": micro, "accumulation": accumulation, "global_batch": total}
        )
        self._accumulating_since = self.micro_steps

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Nothing to do: engine.backward(loss) has reduced them."""

    # ---- compilation, and the end ------------------------------------------------------------------------------------
    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """The model's forward is compiled by torch when it runs next."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        return hasattr(self.module, "_orig_mod") or self.module._compiled_call_impl is not None

    def destroy(self) -> None:
        """The engine lets go of its model, which is a plain one again, whole on every rank; every rank must call it."""
        release(self.module)
