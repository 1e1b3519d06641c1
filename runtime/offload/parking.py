"""Giving a GPU's memory back: everything an engine has there (a paused run) or some of it (`engine.offload_states()`)
moves to host memory, and returns to the same places."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, get_args

import torch

from runtime.wire.messages import Category

if TYPE_CHECKING:
    from runtime.engine import Engine

EVERYTHING: frozenset[Category] = frozenset(get_args(Category))


class Parking:
    """The device memory of one engine. Only between two steps, with nothing under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parked: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # device's (empty), host's

    @property
    def parked(self) -> bool:
        return bool(self._parked)

    def park(self, categories: Collection[Category] = EVERYTHING) -> int:
        """Move out what is of these categories. fp32 parameters that are their own masters stay where parameters stay.
        Returns the bytes that are free now."""
        engine = self._engine
        engine.synchronize()
        engine.saver.before_change()
        engine.gathering.stale()
        engine.pool.drop_free()
        freed = 0
        for storage in self._storages(categories):
            freed += storage.nbytes()
            self._parked.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)
        engine.ledger.parked |= set(categories)
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return freed

    def unpark(self) -> None:
        """Bring everything back. Raises torch.OutOfMemoryError, and leaves it parked, where there is no room."""
        back = 0
        try:
            for storage, kept in self._parked:
                storage.resize_(kept.nbytes())
                back += 1
        except torch.OutOfMemoryError:
            for storage, _ in self._parked[:back]:
                storage.resize_(0)
            if self._engine.device.type == "cuda":
                torch.cuda.empty_cache()
            raise
        for storage, kept in self._parked:
            storage.copy_(kept)
        self._parked.clear()
        self._engine.ledger.parked = set()

    def check(self, call: str, needs: Collection[Category] = EVERYTHING) -> None:
        """Raises RuntimeError where `call` needs what is parked."""
        if self._parked and (missing := self._engine.ledger.parked & set(needs)):
            raise RuntimeError(
                f"engine.{call}: offload_states() moved what it needs to host memory ({', '.join(sorted(missing))}); "
                "call engine.reload_states() on every rank first"
            )

    def _storages(self, categories: Collection[Category] = EVERYTHING) -> Iterator[torch.UntypedStorage]:
        """Each once; those of placeholders and of host memory are left out, and of what belongs to two categories
        (fp32 parameters are masters, too) those of which one stays."""
        engine, seen = self._engine, set[int]()
        tensors = list(self._tensors())
        stays = {tensor.untyped_storage().data_ptr() for category, tensor in tensors if category not in categories}
        for category, tensor in tensors:
            storage = tensor.untyped_storage()
            if category not in categories or storage.data_ptr() in stays:
                continue
            if tensor.device == engine.device and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[tuple[Category, torch.Tensor]]:
        engine = self._engine
        for flat in (*engine.flats, *engine.frozen_flats):
            yield "parameters", flat.whole
            yield "parameters", flat.own
            if flat.trainable:
                yield "masters", flat.masters
            if flat.gradients is not None:
                for buffer in flat.gradients.buffers():
                    yield "gradients", buffer
        for rule in engine.rules:
            for state in rule.states():
                yield "optimizer", state.tensor
        for _, parameter in engine.frozen:
            yield "parameters", parameter.data
        for buffer in engine.module.buffers():
            yield "buffers", buffer
        for memory in engine.working_memory:
            yield "communication", memory
