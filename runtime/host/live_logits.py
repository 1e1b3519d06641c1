"""How much memory logits take at the moment: the largest tensors of a step that no unit of the engine keeps.

The losses of the built-in models note every tensor of [tokens, vocabulary]. A weak reference to its storage says when
autograd or the allocator has let go of it, without a hook and without keeping it.
"""

from __future__ import annotations

import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class LiveTensors:
    """Tensors that were noted and whose memory is still held. Noting one takes some microseconds; other threads may
    read."""

    def __init__(self) -> None:
        self._noted: list[tuple[StorageWeakRef, int]] = []
        self._lock = threading.Lock()
        self._most = 0

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the memory of `tensor`, of any shape, until it is freed; noted twice, it counts once. Returns it."""
        if torch.compiler.is_compiling():  # a compiled model allocates its memory as it likes
            return tensor
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        with self._lock:
            self._forget_freed()
            if all(reference != known for known, _ in self._noted):
                self._noted.append((reference, storage.nbytes()))
            self._most = max(self._most, sum(nbytes for _, nbytes in self._noted))
        return tensor

    def nbytes(self) -> int:
        """Bytes that are held now."""
        with self._lock:
            self._forget_freed()
            return sum(nbytes for _, nbytes in self._noted)

    @property
    def most_bytes(self) -> int:
        """The most that were held at a time."""
        return self._most

    def _forget_freed(self) -> None:
        self._noted = [(reference, nbytes) for reference, nbytes in self._noted if not reference.expired()]


logits = LiveTensors()
"""Those of this process."""
