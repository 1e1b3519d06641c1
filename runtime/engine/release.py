"""Frees GPU memory between steps: moves all tensors of a training state (`pause --release`), or some categories
(`engine.offload_states()`), to host memory, and later back into the same storages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import get_args

import torch

from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.state.train_state import TrainState
from runtime.wire.messages import Category

ALL_CATEGORIES: frozenset[Category] = frozenset(get_args(Category))


class DeviceMemoryRelease:
    """Moves one training state between GPU and host memory. Use it only between two optimizer steps."""

    def __init__(self, state: TrainState, guard: SnapshotGuard) -> None:
        self._state, self._guard = state, guard
        self._moved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # (emptied device storage, host copy)

    @property
    def released(self) -> bool:
        """Whether anything is in host memory now."""
        return bool(self._moved)

    def release(self, categories: Collection[Category] = ALL_CATEGORIES) -> int:
        """Move all tensors of `categories` to host memory; fp32 parameters that are also master weights only move if
        both categories do. Returns the freed bytes."""
        state = self._state
        state.synchronize()
        self._guard.wait_for_all()
        state.unsharder.reshard_all()
        state.pool.drop_free()
        freed = 0
        for storage in self._storages(categories):
            freed += storage.nbytes()
            self._moved.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)
        state.ledger.on_host |= set(categories)
        if state.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB of each thread's on Hopper; made anew when needed
            torch.cuda.empty_cache()
        return freed

    def restore(self) -> None:
        """Move everything back. Raises torch.OutOfMemoryError, with nothing moved, if the GPU lacks memory."""
        back = 0
        try:
            for storage, kept in self._moved:
                storage.resize_(kept.nbytes())
                back += 1
        except torch.OutOfMemoryError:
            for storage, _ in self._moved[:back]:
                storage.resize_(0)
            if self._state.device.type == "cuda":
                torch.cuda.empty_cache()
            raise
        for storage, kept in self._moved:
            storage.copy_(kept)
        self._moved.clear()
        self._state.ledger.on_host = set()

    def check(self, call: str, needs: Collection[Category] = ALL_CATEGORIES) -> None:
        """Raise RuntimeError if engine method `call` needs a category that is in host memory."""
        if self._moved and (missing := self._state.ledger.on_host & set(needs)):
            raise RuntimeError(
                f"engine.{call}: offload_states() has moved {', '.join(sorted(missing))} to host memory; "
                "call engine.reload_states() on every rank first"
            )

    def _storages(self, categories: Collection[Category] = ALL_CATEGORIES) -> Iterator[torch.UntypedStorage]:
        """The device storages of `categories`, each once; without empty placeholders, storages that also belong to
        another category (fp32 parameters may be master weights, too), and storages that cannot be resized: shared
        memory of ranks on CPUs, and memory that a NumPy array has been made of."""
        state, seen = self._state, set[int]()
        tensors = list(self._tensors())
        excluded = {tensor.untyped_storage().data_ptr() for category, tensor in tensors if category not in categories}
        for category, tensor in tensors:
            storage = tensor.untyped_storage()
            if category not in categories or storage.data_ptr() in excluded:
                continue
            if not storage.resizable():
                continue
            if tensor.device == state.device and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[tuple[Category, torch.Tensor]]:
        state = self._state
        for flat in (*state.flats, *state.frozen_flats):
            yield "parameters", flat.full_param
            yield "parameters", flat.param_shard
            if flat.trainable:
                yield "masters", flat.masters
            if flat.gradients is not None:
                for buffer in flat.gradients.buffers():
                    yield "gradients", buffer
        for optimizer in state.shard_optimizers:
            for held in optimizer.states():
                yield "optimizer", held.tensor
        for _, parameter in state.frozen:
            yield "parameters", parameter.data
        for buffer in state.module.buffers():
            yield "buffers", buffer
        for memory in state.working_memory:
            yield "communication", memory
