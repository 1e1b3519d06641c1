"""Giving a GPU's memory back while a run is paused: everything an engine has there moves to host memory, and returns to
the same places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from runtime.engine import Engine


class Parking:
    """The device memory of one engine. Only between two steps, with nothing under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parked: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # device's (empty), host's

    @property
    def parked(self) -> bool:
        return bool(self._parked)

    def park(self) -> int:
        """Move everything out. Returns the bytes that are free now."""
        engine = self._engine
        engine.synchronize()
        engine.saver.before_change()
        engine.gathering.stale()
        engine.pool.drop_free()
        freed = 0
        for storage in self._storages():
            freed += storage.nbytes()
            self._parked.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)
        engine.ledger.parked = True
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
        self._engine.ledger.parked = False

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Each once; those of placeholders and of host memory are left out."""
        engine, seen = self._engine, set[int]()
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if tensor.device == engine.device and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[torch.Tensor]:
        engine = self._engine
        for flat in (*engine.flats, *engine.frozen_flats):
            yield flat.whole
            yield flat.own
            if flat.trainable:
                yield flat.masters
            if flat.gradients is not None:
                yield from flat.gradients.buffers()
        for rule in engine.rules:
            yield from (state.tensor for state in rule.states())
        yield from (parameter.data for _, parameter in engine.frozen)
        yield from engine.module.buffers()
        yield from engine.working_memory
