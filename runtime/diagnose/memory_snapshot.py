"""A memory snapshot of a rank, on request: what its memory is used for, by category, unit and tensor.

It records one or more optimizer steps and then writes, into the run directory, rank-R.json and on a GPU rank-R.pickle,
which https://pytorch.org/memory_viz shows: every allocation of these steps with its stack.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.diagnose.unit_activations import UnitActivations
from runtime.process.atomic_file import replace_text
from runtime.wire.messages import Memory

TENSORS_LISTED = 50
HISTORY_ENTRIES = 200_000
"""Allocations that torch remembers with their stacks; the oldest are dropped."""


class MemorySnapshot:
    """One snapshot of one rank: `begin`, steps, `write`."""

    def __init__(
        self,
        units: UnitActivations,
        device: torch.device,
        memory: Callable[[], Memory],
    ) -> None:
        """units: what their forwards leave for backward. memory: makes the telemetry message."""
        self._units, self._device, self._memory = units, device, memory
        self._history = False

    def begin(self) -> None:
        """Record from now on."""
        self._units.begin()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
            self._history = True

    def stop(self) -> None:
        """Record no more."""
        self._units.stop()

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
            "activations_kept_by_unit": self._units.kept,
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
