"""The CUDA kernels: csrc/cuda. Every call only enqueues work and returns."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, NamedTuple

from runtime.native.loading import (
    DTYPES,
    SUM_BLOCK,
    Hyper,
    RangeStruct,
    check,
    check_overlap,
    cuda,
    hyper,
    i32,
    i64,
    raise_for_cuda,
    u64,
)
from runtime.process.forked import Owner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_GRAD_ON_HOST, _OUT_ON_HOST = 1, 2  # csrc/ranges.h
_NO_STREAM = 2**64 - 1


class Range(NamedTuple):
    """Tensors of one AdamW update, each (numel,), as `adamw` takes them. hyper: index into the call's hypers."""

    p: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    out: torch.Tensor | None = None
    hyper: int = 0


def cuda_adamw(
    p: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    stream: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | torch.Tensor = 1.0,
    adamw: bool = True,
) -> None:
    """Enqueue `adamw` on GPU tensors, with the same bits as on the CPU.

    Args:
        stream: `torch.cuda.current_stream(p.device).cuda_stream`.
        grad_scale: a number, or one fp32 element on the same GPU, so that the host needs not read a clip factor.

    Raises:
        ValueError: as `adamw`.
        RuntimeError: CUDA refused the launch.
    """
    number = isinstance(grad_scale, (int, float))
    h = hyper(
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=float(grad_scale) if number else 1.0,
        adamw=adamw,
    )
    scale = None if isinstance(grad_scale, (int, float)) else grad_scale
    cuda_adamw_ranges([Range(p, m, v, g, out)], [h], stream=stream, adamw=adamw, scale=scale)


def cuda_adamw_ranges(
    ranges: Sequence[Range],
    hypers: Sequence[Hyper],
    *,
    stream: int,
    adamw: bool = True,
    scale: torch.Tensor | None = None,
    changed: torch.Tensor | None = None,
) -> None:
    """Enqueue one step over many ranges on one GPU, in one launch per 56 ranges with 8 hypers.

    Args:
        ranges: all on one GPU, with gradients of one dtype and outputs of one dtype (or none).
        hypers: from `hyper(..., adamw=adamw)`; each range has the index of its own.
        scale: one fp32 element on the GPU that multiplies every hyper's grad_scale; where it is not finite nothing is
            written, so that a step can be skipped without the host knowing.
        changed: one bool on the GPU; where it is true, masters take over outputs that they do not round to: those that
            a script has changed since the last step.

    Raises:
        ValueError: as `adamw`; dtypes or devices that differ between ranges.
        RuntimeError: CUDA refused the launch.
    """
    if not ranges:
        return
    device = ranges[0].p.device
    for r in ranges:
        _check_range(r, len(hypers), device, states="cuda", gradient=("cuda",))
    raise_for_cuda(
        cuda().zt_adamw(
            _structs(ranges),
            len(ranges),
            (Hyper * len(hypers))(*hypers),
            *_dtypes(ranges),
            int(not adamw),
            _scale_address(scale, device),
            _flag_address(changed, device),
            device.index,
            stream,
        )
    )


def cuda_sums_of_squares(xs: Sequence[torch.Tensor], work: torch.Tensor, result: torch.Tensor, *, stream: int) -> None:
    """`sum_of_squares` of many GPU tensors in one pass, without a synchronisation. A sum is finite exactly when every
    element is.

    Args:
        xs: (numel,) each, fp32, bf16 or fp16 in any mixture, on one GPU.
        work: at least `sums_work(xs)` fp64 on the same GPU; overwritten.
        result: (len(xs) + 1,) fp64 on the same GPU: receives each tensor's sum, then the sum of those in their order.
    """
    for index, x in enumerate(xs):
        check(f"xs[{index}]", x, x.numel(), tuple(DTYPES), "cuda")
    need = sums_work(xs)
    if work.numel() < need:
        raise ValueError(f"work has {work.numel()} elements; these tensors need {need}")
    check("work", work, work.numel(), ("torch.float64",), "cuda")
    check("result", result, len(xs) + 1, ("torch.float64",), "cuda")
    if any(t.device != result.device for t in (*xs, work)):
        raise ValueError("xs, work and result must be on one GPU")
    raise_for_cuda(
        cuda().zt_sums_of_squares(
            (u64 * len(xs))(*(x.data_ptr() for x in xs)),
            (i64 * len(xs))(*(x.numel() for x in xs)),
            (i32 * len(xs))(*(DTYPES[str(x.dtype)] for x in xs)),
            len(xs),
            work.data_ptr(),
            result.data_ptr(),
            result.device.index,
            stream,
        )
    )


def sums_work(xs: Sequence[torch.Tensor]) -> int:
    """Number of fp64 elements that `cuda_sums_of_squares` needs as `work`."""
    return max(1, 2 * sum(-(-x.numel() // SUM_BLOCK) for x in xs))


class StreamedAdamW:
    """AdamW on a GPU for states that stay in page-locked host memory: chunks of p, m and v stream through device slots
    on a copy-in, a compute and a copy-out stream. csrc/stream.h draws the schedule. Same bits as `adamw`.

    `step` only enqueues. Calls on different ranges follow one another without a gap; two calls on the same range need
    an order that the caller gives: let the second one wait for what the first one signals.
    """

    def __init__(
        self, memory: torch.Tensor, *, chunk: int, slots: int = 3, grad_size: int = 0, out_size: int = 0
    ) -> None:
        """
        Args:
            memory: (at least `bytes_needed(...)`,) uint8 on the GPU; kept until `close`.
            chunk: elements per slot, a multiple of 64. A few MiB (1 << 20 elements) keep the copy engines busy.
            slots: 1 to 16. With three, loading, updating and storing overlap.
            grad_size, out_size: bytes per element of gradients and outputs that are on the host; 0: none are.
        """
        need = self.bytes_needed(chunk, slots, grad_size, out_size)
        check("memory", memory, memory.numel(), ("torch.uint8",), "cuda")
        if memory.numel() < need:
            raise ValueError(f"memory has {memory.numel()} bytes; {slots} slots of {chunk} elements need {need}")
        self._memory, self._shape = memory, (chunk, slots, grad_size, out_size)
        self._open()

    def _open(self) -> None:
        self._handle, self._owner = u64(), Owner()
        self._address = self._memory.data_ptr()
        device, handle = self._memory.device.index, ctypes.byref(self._handle)
        raise_for_cuda(cuda().zt_stream_new(device, self._address, *self._shape, handle))

    def _follow_memory(self) -> None:
        """Open the stream again if the storage was freed and allocated elsewhere (runtime/engine/release.py)."""
        if self._memory.data_ptr() != self._address:
            handle, self._handle = self._handle, u64()
            raise_for_cuda(cuda().zt_stream_free(handle))
            self._open()

    @staticmethod
    def bytes_needed(chunk: int, slots: int, grad_size: int = 0, out_size: int = 0) -> int:
        """Device memory of the ring, in bytes: slots x chunk x (12 + grad_size + out_size)."""
        need: int = cuda().zt_stream_bytes(chunk, slots, grad_size, out_size)
        if need < 0:
            raise ValueError(f"chunk must be a multiple of 64 (is {chunk}) and slots 1 to 16 (is {slots})")
        return need

    def step(
        self,
        ranges: Sequence[Range],
        hypers: Sequence[Hyper],
        *,
        adamw: bool = True,
        scale: torch.Tensor | None = None,
        changed: torch.Tensor | None = None,
        wait_stream: int | None = None,
        wait_event: int | None = None,
        signal_stream: int | None = None,
        signal_event: int | None = None,
    ) -> None:
        """Enqueue one step over `ranges`, whose gradients have one dtype and whose outputs have one dtype (or none).

        Args:
            ranges: p, m, v page-locked on the host; g and out each there or on the GPU.
            hypers, scale, changed: as `cuda_adamw_ranges`; a skipped step transfers everything and changes nothing. The
                caller keeps both tensors until the step is done.
            wait_stream, wait_event: a CUDA stream (an int; 0 is the default stream) and a CUDA event. The step begins
                after the work that is enqueued on the stream now, and after the event. One of them must cover the work
                that makes the gradients, reads the outputs and uses the states.
            signal_stream: a CUDA stream whose later work begins after the step, writes to host memory included.
            signal_event: a CUDA event that is recorded after the step. It must have been recorded once before, because
                torch creates an event only then.

        Raises:
            ValueError: as `adamw`; memory that is not page-locked; a host gradient or output without room in the slots.
            RuntimeError: CUDA refused.
        """
        if self._handle.value == 0:
            raise RuntimeError("StreamedAdamW.step() after close()")
        self._follow_memory()
        for event in (wait_event, signal_event):
            if event == 0:
                raise ValueError("an event that was never recorded has no handle: record it once before")
        device = self._memory.device
        for r in ranges:
            _check_range(r, len(hypers), device, states="cpu", gradient=("cpu", "cuda"))
            for name, t in zip("pmvgo", (r.p, r.m, r.v, r.g, r.out), strict=True):
                if t is not None and t.device.type == "cpu" and t.numel() and not t.is_pinned():
                    raise ValueError(f"{'out' if name == 'o' else name} must be page-locked (host/pinned.py)")
        raise_for_cuda(
            cuda().zt_stream_adamw(
                self._handle,
                _structs(ranges),
                len(ranges),
                (Hyper * len(hypers))(*hypers),
                *_dtypes(ranges),
                int(not adamw),
                _scale_address(scale, device),
                _flag_address(changed, device),
                _NO_STREAM if wait_stream is None else wait_stream,
                wait_event or 0,
                _NO_STREAM if signal_stream is None else signal_stream,
                signal_event or 0,
            )
        )

    def close(self) -> None:
        """Wait for all steps and free the streams. A second call does nothing."""
        if self._handle.value:
            handle, self._handle = self._handle, u64()
            raise_for_cuda(cuda().zt_stream_free(handle))
            del self._memory

    def __enter__(self) -> StreamedAdamW:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None and self._owner.is_here and not sys.is_finalizing():
            self.close()


def pin(address: int, nbytes: int, device: int) -> None:
    """Page-lock memory for every GPU of this process. device: where a CUDA context is created if there is none yet.

    Raises:
        RuntimeError: CUDA refused; most often the host is out of memory, or the range is registered already.
    """
    raise_for_cuda(cuda().zt_pin(address, nbytes, device))


def unpin(address: int) -> None:
    """Undo `pin`, by the same address. No copy from or to the memory may be under way."""
    raise_for_cuda(cuda().zt_unpin(address))


def _check_range(r: Range, hypers: int, device: torch.device, *, states: str, gradient: tuple[str, ...]) -> None:
    n = r.p.numel()
    for name, t in (("p", r.p), ("m", r.m), ("v", r.v)):
        check(name, t, n, ("torch.float32",), states)
    for name, tensor in (("g", r.g), ("out", r.out)):
        if tensor is not None:
            kind = tensor.device.type
            check(name, tensor, n, tuple(DTYPES), kind if kind in gradient else gradient[-1])
    if r.out is not None:
        check_overlap(r.g, r.out)
    for tensor in (r.p, r.m, r.v, r.g, r.out):
        if tensor is not None and tensor.device.type == "cuda" and tensor.device != device:
            raise ValueError(f"all ranges must be on {device}, one is on {tensor.device}")
    if not 0 <= r.hyper < hypers:
        raise ValueError(f"a range has hyper index {r.hyper}, but there are {hypers} hypers")


def _dtypes(ranges: Sequence[Range]) -> tuple[int, int]:
    grads = {str(r.g.dtype) for r in ranges}
    outs = {str(r.out.dtype) if r.out is not None else "" for r in ranges}
    if len(grads) > 1 or len(outs) > 1:
        raise ValueError(f"one call takes gradients and outputs of one dtype each, got {sorted(grads)} {sorted(outs)}")
    return DTYPES[grads.pop()] if grads else 1, DTYPES.get(outs.pop(), 0) if outs else 0


def _structs(ranges: Sequence[Range]) -> ctypes.Array[RangeStruct]:
    return (RangeStruct * len(ranges))(
        *(
            RangeStruct(
                r.p.data_ptr(),
                r.m.data_ptr(),
                r.v.data_ptr(),
                r.g.data_ptr(),
                r.out.data_ptr() if r.out is not None else 0,
                r.p.numel(),
                r.hyper,
                (_GRAD_ON_HOST if r.g.device.type == "cpu" else 0)
                | (_OUT_ON_HOST if r.out is not None and r.out.device.type == "cpu" else 0),
            )
            for r in ranges
        )
    )


def _scale_address(scale: torch.Tensor | None, device: torch.device) -> int:
    if scale is None:
        return 0
    check("scale", scale.view(-1), 1, ("torch.float32",), "cuda")
    if scale.device != device:
        raise ValueError(f"scale must be on {device}, is on {scale.device}")
    return scale.data_ptr()


def _flag_address(flag: torch.Tensor | None, device: torch.device) -> int:
    if flag is None:
        return 0
    check("changed", flag.view(-1), 1, ("torch.bool",), "cuda")
    if flag.device != device:
        raise ValueError(f"changed must be on {device}, is on {flag.device}")
    return flag.data_ptr()
