"""Releasing a GPU's memory: all that a training state has there (`pause --release`), or a part of it
(`engine.offload_states()`), moves to host memory, and returns to the same places."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import get_args

import torch

from runtime.checkpoint.snapshot import SnapshotGuard
from runtime.state.train_state import TrainState
from runtime.wire.messages import Category

EVERYTHING: frozenset[Category] = frozenset(get_args(Category))


class DeviceMemoryRelease:
    """Of one training state. Only between two steps."""

    def __init__(self, state: TrainState, guard: SnapshotGuard) -> None:
        self._state, self._guard = state, guard
        self._moved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # device's (empty), host's

    @property
    def released(self) -> bool:
        return bool(self._moved)

    def release(self, categories: Collection[Category] = EVERYTHING) -> int:
        """Move out what is of these categories. fp32 parameters that are their own masters stay where parameters stay.
        Returns the bytes that are free now."""
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
            torch.cuda.empty_cache()
        return freed

    def restore(self) -> None:
        """Bring everything back. Raises torch.OutOfMemoryError, and leaves it released, where there is no room."""
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

    def check(self, call: str, needs: Collection[Category] = EVERYTHING) -> None:
        """Raises RuntimeError where `call` needs what is released."""
        if self._moved and (missing := self._state.ledger.on_host & set(needs)):
            raise RuntimeError(
                f"engine.{call}: offload_states() moved what it needs to host memory ({', '.join(sorted(missing))}); "
                "call engine.reload_states() on every rank first"
            )

    def _storages(self, categories: Collection[Category] = EVERYTHING) -> Iterator[torch.UntypedStorage]:
        """Each once; those of placeholders and of host memory are left out, and of what belongs to two categories
        (fp32 parameters are masters, too) those of which one stays."""
        state, seen = self._state, set[int]()
        tensors = list(self._tensors())
        stays = {tensor.untyped_storage().data_ptr() for category, tensor in tensors if category not in categories}
        for category, tensor in tensors:
            storage = tensor.untyped_storage()
            if category not in categories or storage.data_ptr() in stays:
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
