"""Updates offloaded states on the GPU, through which they stream in chunks, while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from runtime import native
from runtime.comm.transfer import Copy, CudaCopy
from runtime.plan.constants import STREAM_SLOTS
from runtime.plan.layout import STATE_BYTES


def _chunk(chunk_bytes: int) -> int:
    """Elements of a chunk whose states take `chunk_bytes`."""
    return max(64, chunk_bytes // STATE_BYTES // 64 * 64)


def ring_bytes(chunk_bytes: int, gradient: torch.dtype, out: torch.dtype) -> int:
    """Device memory of a GpuStreamer, in bytes."""
    return STREAM_SLOTS * _chunk(chunk_bytes) * (STATE_BYTES + gradient.itemsize + out.itemsize)


class GpuStreamer:
    """Adapts `native.StreamedAdamW` to ParamUpload's Streamer."""

    def __init__(self, device: torch.device, chunk_bytes: int, gradient: torch.dtype, out: torch.dtype) -> None:
        """chunk_bytes: states per slot. gradient, out: dtypes of gradients and outputs that are on the host."""
        self.device = device
        chunk = _chunk(chunk_bytes)
        sizes = {"grad_size": gradient.itemsize, "out_size": out.itemsize}
        nbytes = native.StreamedAdamW.bytes_needed(chunk, STREAM_SLOTS, **sizes)
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._idle = torch.cuda.Stream(device)
        self._streamed = native.StreamedAdamW(self.memory, chunk=chunk, slots=STREAM_SLOTS, **sizes)

    def update(
        self,
        pieces: Sequence[native.Range],
        hypers: Sequence[dict[str, Any]],
        scale: float | torch.Tensor,
        after: torch.cuda.Event,
        changed: torch.Tensor | None = None,
    ) -> Copy:
        """See upload.Streamer."""
        number, on_device = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        done = torch.cuda.Event()
        done.record(self._idle)  # torch makes an event's handle when it is first recorded
        self._streamed.step(
            pieces,
            [native.hyper(grad_scale=number, **numbers) for numbers in hypers],
            adamw=bool(hypers[0]["adamw"]),
            scale=on_device,
            changed=changed,
            wait_event=after.cuda_event,
            signal_event=done.cuda_event,
        )
        return CudaCopy(self.device, done)
