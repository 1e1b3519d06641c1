"""Explains an out-of-memory error in this rank: the failed allocation, what holds memory, and what to change.

explain() first reads the figures, then frees what the failed step holds, and only then composes text, because it must
work with next to no memory. It never raises, so the plain traceback remains in any case.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import logging
import re
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from runtime.config import Resolved
from runtime.diagnose.memory_report import MemoryReport, report_lines, take_memory_report
from runtime.diagnose.planned import planned_workload
from runtime.diagnose.remedies import Remedy, Shortage, remedies, remedy_lines
from runtime.host.ledger import Ledger
from runtime.models.names import plain_name
from runtime.plan.workload import Workload
from runtime.wire.sizes import format_size, parse_size
from runtime.zero.cut import Cut

log = logging.getLogger("runtime.engine")

_REQUESTED = re.compile(
    r"[Tt]ried to allocate ([\d.]+ ?[KMGTP]?i?B|[\d.]+ bytes)"  # torch, on a GPU and on a CPU
    r"|Unable to allocate ([\d.]+ [KMGTP]?iB|[\d.]+ bytes)"  # numpy
    r"|\bno ([\d.,]+(?: [KMGTP]iB)?) (?:of address space|left)"  # ours: host/pinned.py, comm/shared_memory.py
)
_GPU = re.compile(r"GPU (\d+) has a total capacity")
_ON_DEVICE = re.compile(
    r"CUDA(( driver)? error)?: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|[Cc]uda failure \S* ?'out of memory'|cudaErrorMemoryAllocation"
)
_ON_HOST = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc")
_SHARED = re.compile(
    r"(shared memory|/torch_|/dev/shm).*(No space left on device|\(28\))|unable to allocate shared memory"
    r"|is killed by signal: Bus error",
    re.DOTALL,
)
_PINNING = ("runtime/host/pinned.py",)
"""Files in which CUDA's "out of memory" refers to pinned host memory."""


@dataclass(frozen=True)
class FailedAllocation:
    """An allocation that failed."""

    place: Literal["device", "host", "shared"]
    """Which memory ran out: GPU, host, or /dev/shm."""
    requested_bytes: int | None = None
    device: int | None = None
    """Index of the GPU, if torch's message has it."""
    what: str = ""
    """Kind of host memory: "pinned", or empty."""


@dataclass(frozen=True)
class EngineRecord:
    """What is needed to explain an out-of-memory error of an engine, without keeping the engine alive."""

    module: weakref.ref[nn.Module]
    ledger: weakref.ref[Ledger]
    config: Resolved
    device: torch.device
    workload: Workload


class RunPosition(Protocol):
    """Progress of this process's run: the part of Session that this module uses."""

    recorder: Any
    """Telemetry, which knows the current phase."""

    @property
    def step(self) -> Callable[[], int]:
        """A function that returns the number of finished optimizer steps."""


@dataclass(frozen=True)
class Explanation:
    """The text of an out-of-memory report."""

    lines: tuple[str, ...]
    """The report, without `reason`."""
    reason: str
    """A summary in one line."""

    @property
    def text(self) -> str:
        """The report and its summary."""
        return "\n".join((*self.lines, self.reason))


_engine_records: list[EngineRecord] = []
_kept: list[Any] = []
"""Engines kept alive after a failed step: their destructors may wait for copies, or for collectives that other ranks
never enter."""


def record_engine(
    module: nn.Module, config: Resolved, device: torch.device, ledger: Ledger, cuts: Sequence[Cut]
) -> None:
    """Record what `explain` needs about an engine that is being built for `module`."""
    _engine_records[:] = [one for one in _engine_records if one.ledger() is not None]
    workload = planned_workload(module, config, cuts)
    if device.type == "cuda":  # the same figure as runtime/offload/placement.py uses to choose what remains on the GPU
        workload = dataclasses.replace(workload, free_vram_bytes=torch.cuda.mem_get_info(device)[0])
    _engine_records.append(EngineRecord(weakref.ref(module), weakref.ref(ledger), config, device, workload))


def workload_of_engine(module: nn.Module) -> Workload | None:
    """The workload of the engine that was built for `module`; None if there is none."""
    return next((one.workload for one in reversed(_engine_records) if one.module() is module), None)


def explain(error: BaseException, session: RunPosition | None, keep: type) -> Explanation | None:
    """The report on an out-of-memory error. None for any other error, or if composing the report fails. keep: the
    engine class, whose instances must not be garbage-collected now."""
    try:
        failure, found = _first(error)
        if failure is None or found is None:
            return None
        known = max(
            (one for one in _engine_records if one.ledger() is not None),
            key=lambda one: one.workload.parameters,
            default=None,
        )
        ledgers = [ledger for one in _engine_records if (ledger := one.ledger()) is not None]
        held = take_memory_report(ledgers, known.device if known else _device(failure))
        where = _where(found, known, session)
        _free_failed_step(error, keep)
        return _compose(failure, held, known, where)
    except Exception as problem:  # the original error matters more
        log.warning(f"could not build the out-of-memory report: {type(problem).__name__}: {problem}")
        return None


# ---- recognition -----------------------------------------------------------------------------------------------------
def _first(error: BaseException) -> tuple[FailedAllocation | None, BaseException | None]:
    """The failed allocation and the error that reports it: `error` or one of its causes."""
    for one in _chain(error):
        if (failure := recognise(one)) is not None:
            return failure, one
    return None, None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def recognise(error: BaseException) -> FailedAllocation | None:
    """The failed allocation that `error` reports; None if it is no out-of-memory error."""
    text = str(error)
    requested = _requested(text)
    if isinstance(error, torch.OutOfMemoryError):
        gpu = _GPU.search(text)
        return FailedAllocation("device", requested, int(gpu[1]) if gpu else None)
    if isinstance(error, RuntimeError) and _ON_DEVICE.search(text):
        pinning = next((frame for frame in _frames(error) if frame.f_code.co_filename.endswith(_PINNING)), None)
        if pinning is not None:
            return FailedAllocation("host", _local(pinning, "nbytes"), what="pinned")
        return FailedAllocation("device", requested)
    if isinstance(error, OSError | RuntimeError) and _SHARED.search(text):
        return FailedAllocation("shared", requested)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and str(error.filename).startswith("/dev/shm"):
        return FailedAllocation("shared")
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or (isinstance(error, Exception) and _ON_HOST.search(text)):
        return FailedAllocation("host", requested)
    return None


def _requested(text: str) -> int | None:
    found = _REQUESTED.search(text)
    if found is None:
        return None
    size = next(group for group in found.groups() if group).replace(",", "").strip()
    return parse_size(size.removesuffix("bytes").strip() + " B" if size[-1].isdigit() or "bytes" in size else size)


def _device(failure: FailedAllocation) -> torch.device:
    if failure.place != "device":
        return torch.device("cpu")
    return torch.device("cuda", failure.device or 0)


# ---- position --------------------------------------------------------------------------------------------------------
def _where(error: BaseException, known: EngineRecord | None, session: RunPosition | None) -> str:
    """Phase, step, micro-step, and module or unit of the failed allocation, as far as known."""
    place = _position(session)
    module = known.module() if known is not None else None
    part = _part(error, module) if module is not None else ""
    return f"{place}, in {part}" if part else place


def _position(session: RunPosition | None) -> str:
    if session is None:
        return "before initialize()"
    recorder: Any = session.recorder
    if not hasattr(recorder, "position"):
        return f"after step {session.step()}"
    now = recorder.position()
    if now.phase == "init":
        return "initialize()"
    accumulation = _engine_records[-1].config.accumulation if _engine_records else None
    of = f" of {accumulation}" if accumulation else ""
    return f"{now.phase} of step {now.step}" + (f", micro-step {now.micro_step}{of}" if now.micro_step else "")


def _part(error: BaseException, model: nn.Module) -> str:
    """The innermost module, else unit, in the traceback."""
    names = {id(module): plain_name(name) for name, module in model.named_modules() if plain_name(name)}
    frames = list(_frames(error))
    for frame in reversed(frames):
        if (name := names.get(id(frame.f_locals.get("self")))) is not None:
            return name
    for frame in reversed(frames):
        for variable in ("unit", "flat", "spec"):
            thing = frame.f_locals.get(variable)
            name = getattr(getattr(thing, "unit", thing), "name", None)
            if type(thing).__module__.startswith("runtime.") and isinstance(name, str):
                return f"unit {name}"
    return ""


def _frames(error: BaseException) -> Iterator[FrameType]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame


def _local(frame: FrameType, name: str) -> int | None:
    value = frame.f_locals.get(name)
    return value if isinstance(value, int) else None


# ---- freeing memory --------------------------------------------------------------------------------------------------
def _free_failed_step(error: BaseException, keep: type) -> None:
    """Free activations and everything else that the traceback's frames reference, except engines."""
    for one in _all(error):
        for frame in _frames(one):
            _kept.extend(value for value in frame.f_locals.values() if isinstance(value, keep))
        traceback.clear_frames(one.__traceback__)
        for frame in _frames(one):
            len(frame.f_locals)  # up to Python 3.12 a frame caches f_locals until the next read
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as problem:  # after some errors every CUDA call fails
            log.debug(f"empty_cache: {problem}")


def _all(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]


# ---- composing -------------------------------------------------------------------------------------------------------
def _compose(failure: FailedAllocation, held: MemoryReport, known: EngineRecord | None, where: str) -> Explanation:
    if failure.place == "shared":
        return _shared(failure, held, where)
    size = "memory" if failure.requested_bytes is None else format_size(failure.requested_bytes)
    kind = f"{failure.what} host memory".strip()
    if failure.place == "device":
        asked = f"tried to allocate {size} on {held.device}"
    else:
        asked = f"tried to allocate {kind if failure.requested_bytes is None else f'{size} of {kind}'}"
    free, total = (
        (held.free_device_bytes, held.total_device_bytes)
        if failure.place == "device"
        else (held.free_host_bytes, held.host_total_bytes)
    )
    left = f", {format_size(free)} free" if free is not None else ""
    shortage = Shortage(
        failure.place,
        need_bytes=max(0, failure.requested_bytes - (free or 0)) or None if failure.requested_bytes else None,
        free_device_bytes=held.free_device_bytes,
        free_host_bytes=held.free_host_bytes,
        unexplained_bytes=held.activations_bytes,
    )
    hopeless = total is not None and failure.requested_bytes is not None and failure.requested_bytes > total
    found = remedies(known.workload, known.config, shortage) if known is not None and not hopeless else []
    lines = [f"Out of memory: {asked}{left}; {where}", *report_lines(held, failure.place)]
    if hopeless:
        way = (
            f"no setting helps, as that exceeds the total of {format_size(total or 0)}: see the code that allocates it"
        )
        lines.append(f"What to change: {way}, in the traceback")
    else:
        way = f"try {found[0].short(shortage.where)}" if found else ""
        lines += _advice(failure, held, known, found, shortage)
    ran_out = "GPU memory" if failure.place == "device" else kind
    return Explanation(tuple(lines), f"out of {ran_out}: {asked}{left} ({where}){way and '; '}{way}")


def _advice(
    failure: FailedAllocation,
    held: MemoryReport,
    known: EngineRecord | None,
    found: Sequence[Remedy],
    shortage: Shortage,
) -> Iterator[str]:
    lines = [f"  {line}" for line in remedy_lines(found, shortage)]
    pieces = held.cached_bytes
    if (
        failure.place == "device"
        and failure.requested_bytes
        and pieces is not None
        and pieces >= failure.requested_bytes
    ):
        lines.append(
            f"  torch's allocator caches {format_size(pieces)}, in fragments that are too small: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment"
        )
    if failure.place == "host" and known is not None and known.config.device == "cuda" and not found:
        lines.append(
            "  No config key lowers this: the engine keeps little in host memory here. Check the data loading (each "
            "of a DataLoader's num_workers processes has its own copy of the data set) and the script's own data"
        )
    if failure.place == "host" and held.address_space is not None:
        lines.append("  The limit on address space (ulimit -v) counts reserved memory, too: raise or remove it")
    if lines:
        unchanged = (
            f" (the global batch of {known.config.global_batch} is unchanged)" if found and known is not None else ""
        )
        yield f"What to change{unchanged}:"
    yield from lines


def _shared(failure: FailedAllocation, held: MemoryReport, where: str) -> Explanation:
    total, free = held.shared_bytes or (0, 0)
    size = f"/dev/shm has {format_size(total)}, {format_size(free)} free"
    way = (
        "use fewer num_workers in the DataLoader, or give it more (docker run --shm-size=8g; mount -o remount,size=8G)"
    )
    asked = f"tried to allocate {format_size(failure.requested_bytes)}; " if failure.requested_bytes is not None else ""
    lines = (f"Out of shared memory: {asked}{where}", f"  {size}", f"What to change: {way}")
    return Explanation(lines, f"out of shared memory: {size} ({where}); {way}")
