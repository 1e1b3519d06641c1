"""A memory snapshot of a rank, on request: what its memory is used for, by category, unit and tensor.

It records one or more optimizer steps and then writes, into the run directory, rank-R.json and on a GPU rank-R.pickle,
which https://pytorch.org/memory_viz shows: every allocation of these steps with its stack.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from runtime.process.atomic_file import replace_text
from runtime.wire.messages import Memory

TENSORS_LISTED = 50
HISTORY_ENTRIES = 200_000
"""Allocations that torch remembers with their stacks; the oldest are dropped."""


class MemorySnapshot:
    """One snapshot of one rank: `begin`, steps, `write`."""

    def __init__(
        self,
        units: Iterable[tuple[str, list[nn.Module]]],
        device: torch.device,
        activations: Callable[[], int | None],
        memory: Callable[[], Memory],
    ) -> None:
        """units: name and modules of each. activations: bytes beyond the ledger now; None if not known. memory: makes
        the telemetry message."""
        self._units, self._device = list(units), device
        self._activations, self._memory = activations, memory
        self._hooks: list[RemovableHandle] = []
        self._before: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        """Most activations that a forward of each unit has left for backward, in bytes."""
        self._history = False

    def begin(self) -> None:
        """Record from now on."""
        for name, modules in self._units:
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(self._enter(name)))
                self._hooks.append(module.register_forward_hook(self._leave(name)))
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
            self._history = True

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._before[name] = self._activations() or 0

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            kept = (self._activations() or 0) - self._before.pop(name, 0)
            self.kept[name] = max(self.kept.get(name, 0), kept)

        return hook

    def stop(self) -> None:
        """Record no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def write(self, folder: Path, rank: int, step: int) -> list[Path]:
        """Stop, and write this rank's files. Raises OSError."""
        self.stop()
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"rank-{rank}.json"]
        replace_text(written[0], json.dumps(self.document(rank, step), indent=1) + "\n")
        if self._device.type == "cuda":
            written.append(folder / f"rank-{rank}.pickle")
            torch.cuda.memory._dump_snapshot(str(written[-1]))
        if self._history:
            self._history = False
            torch.cuda.memory._record_memory_history(enabled=None)
        return written

    def document(self, rank: int, step: int) -> dict[str, Any]:
        """The snapshot as JSON."""
        tensors = live_tensors()
        return {
            "rank": rank,
            "step": step,
            "device": str(self._device),
            "memory": self._memory().model_dump(mode="json"),
            "activations_kept_by_unit": self.kept,
            "tensor_bytes": sum(tensor["bytes"] for tensor in tensors),
            "largest_tensors": tensors[:TENSORS_LISTED],
        }


def live_tensors() -> list[dict[str, Any]]:
    """Tensors that Python can reach, grouped by device, type and shape, largest group first; storages that several
    share count once. What only autograd or C++ code holds is not among them."""
    seen: set[tuple[str, int]] = set()
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for one in gc.get_objects():
        if not issubclass(type(one), torch.Tensor):  # isinstance() would ask lazy objects for their class
            continue
        try:
            storage = one.untyped_storage()
            key = (str(one.device), storage.data_ptr())
            nbytes = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # meta, sparse and wrapped tensors
            continue
        if not key[1] or key in seen:
            continue
        seen.add(key)
        group = groups.setdefault((key[0], str(one.dtype).removeprefix("torch."), tuple(one.shape)), [0, 0])
        group[0] += 1
        group[1] += nbytes
    found = [
        {"device": device, "dtype": dtype, "shape": list(shape), "count": count, "bytes": nbytes}
        for (device, dtype, shape), (count, nbytes) in groups.items()
    ]
    return sorted(found, key=lambda group: -group["bytes"])
