"""Memory has run out in this rank: what was asked for and where, what held the memory, and what to change.

explain() reads the figures first, then lets go of what the failed step held, and only then writes: it must work when
next to nothing is left. It never raises, so the plain traceback remains whatever happens here.
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
from runtime.diagnose.held import Held, held_lines, read_held
from runtime.diagnose.remedies import Remedy, Shortage, remedies, remedy_lines
from runtime.host.ledger import Ledger
from runtime.models.gpt import GPT
from runtime.models.names import plain_name
from runtime.plan.workload import Workload, workload_of
from runtime.wire.sizes import format_size, parse_size
from runtime.zero.cut import Cut

log = logging.getLogger("runtime.engine")

_ASKED = re.compile(
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
"""Files in which CUDA's "out of memory" means page-locked host memory."""


@dataclass(frozen=True)
class Failure:
    """An allocation that failed."""

    place: Literal["device", "host", "shared"]
    asked_bytes: int | None = None
    device: int | None = None
    """The GPU's number, where torch named it."""
    what: str = ""


@dataclass(frozen=True)
class Known:
    """What initialize() has told about an engine. Nothing here keeps it, or its memory, alive."""

    module: weakref.ref[nn.Module]
    ledger: weakref.ref[Ledger]
    config: Resolved
    device: torch.device
    workload: Workload


class RunPosition(Protocol):
    """How far the run of this process is."""

    recorder: Any
    """Telemetry, which knows the phase."""

    @property
    def step(self) -> Callable[[], int]:
        """Returns the finished steps."""


@dataclass(frozen=True)
class Explanation:
    lines: tuple[str, ...]
    reason: str
    """All of it in one line."""

    @property
    def text(self) -> str:
        return "\n".join((*self.lines, self.reason))


_known: list[Known] = []
_kept: list[Any] = []
"""Engines of a failed step. The end of one may wait for copies, or for collectives that the others will never enter."""


def remember(module: nn.Module, config: Resolved, device: torch.device, ledger: Ledger, cuts: Sequence[Cut]) -> None:
    """An engine is being made of `module`."""
    _known[:] = [one for one in _known if one.ledger() is not None]
    units = [(cut.name, sum(p.numel() for _, p in cut.parameters if p.requires_grad)) for cut in cuts]
    known_shape = isinstance(module, GPT) and module.config.max_seq_len == config.zerotop.data.seq_len
    workload = workload_of(config, type(module).__name__, units, module.config if known_shape else None)  # type: ignore[arg-type]
    if device.type == "cuda":  # as much as runtime/offload/placement.py finds when it decides what stays there
        workload = dataclasses.replace(workload, free_vram_bytes=torch.cuda.mem_get_info(device)[0])
    _known.append(Known(weakref.ref(module), weakref.ref(ledger), config, device, workload))


def explain(error: BaseException, session: RunPosition | None, keep: type) -> Explanation | None:
    """What held the memory that ran out, and what to change. None for an error that is something else, and where even
    this fails. keep: the class of engines, which must not be collected now."""
    try:
        failure, found = _first(error)
        if failure is None or found is None:
            return None
        known = max(
            (one for one in _known if one.ledger() is not None), key=lambda one: one.workload.parameters, default=None
        )
        ledgers = [ledger for one in _known if (ledger := one.ledger()) is not None]
        held = read_held(ledgers, known.device if known else _device(failure))
        where = _where(found, known, session)
        _let_go(error, keep)
        return _written(failure, held, known, where)
    except Exception as problem:  # the error itself is what must be seen
        log.warning(f"could not build the out-of-memory report: {type(problem).__name__}: {problem}")
        return None


# ---- recognising -----------------------------------------------------------------------------------------------------
def _first(error: BaseException) -> tuple[Failure | None, BaseException | None]:
    """The failure and the error that told it: this one or what it was raised from."""
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


def recognise(error: BaseException) -> Failure | None:
    """Whether memory ran out, and which."""
    text = str(error)
    asked = _asked(text)
    if isinstance(error, torch.OutOfMemoryError):
        gpu = _GPU.search(text)
        return Failure("device", asked, int(gpu[1]) if gpu else None)
    if isinstance(error, RuntimeError) and _ON_DEVICE.search(text):
        pinning = next((frame for frame in _frames(error) if frame.f_code.co_filename.endswith(_PINNING)), None)
        if pinning is not None:
            return Failure("host", _local(pinning, "nbytes"), what="page-locked")
        return Failure("device", asked)
    if isinstance(error, OSError | RuntimeError) and _SHARED.search(text):
        return Failure("shared", asked)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and str(error.filename).startswith("/dev/shm"):
        return Failure("shared")
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or (isinstance(error, Exception) and _ON_HOST.search(text)):
        return Failure("host", asked)
    return None


def _asked(text: str) -> int | None:
    found = _ASKED.search(text)
    if found is None:
        return None
    size = next(group for group in found.groups() if group).replace(",", "").strip()
    return parse_size(size.removesuffix("bytes").strip() + " B" if size[-1].isdigit() or "bytes" in size else size)


def _device(failure: Failure) -> torch.device:
    if failure.place != "device":
        return torch.device("cpu")
    return torch.device("cuda", failure.device or 0)


# ---- where -----------------------------------------------------------------------------------------------------------
def _where(error: BaseException, known: Known | None, session: RunPosition | None) -> str:
    """Phase, step, micro-step, and the module or unit, as far as they can be told."""
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
    accumulation = _known[-1].config.accumulation if _known else None
    of = f" of {accumulation}" if accumulation else ""
    return f"{now.phase} of step {now.step}" + (f", micro-step {now.micro_step}{of}" if now.micro_step else "")


def _part(error: BaseException, model: nn.Module) -> str:
    """The innermost module, or else unit, that was at work."""
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


# ---- letting go ------------------------------------------------------------------------------------------------------
def _let_go(error: BaseException, keep: type) -> None:
    """Of the activations and whatever else the frames of the failed step hold; not of the engines."""
    for one in _all(error):
        for frame in _frames(one):
            _kept.extend(value for value in frame.f_locals.values() if isinstance(value, keep))
        traceback.clear_frames(one.__traceback__)
        for frame in _frames(one):
            len(frame.f_locals)  # until Python 3.12 what was read from a frame stays with it until it is read again
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as problem:  # after some errors CUDA answers nothing any more
            log.debug(f"empty_cache: {problem}")


def _all(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]


# ---- writing ---------------------------------------------------------------------------------------------------------
def _written(failure: Failure, held: Held, known: Known | None, where: str) -> Explanation:
    if failure.place == "shared":
        return _shared(failure, held, where)
    size = "memory" if failure.asked_bytes is None else format_size(failure.asked_bytes)
    kind = f"{failure.what} host memory".strip()
    if failure.place == "device":
        asked = f"tried to allocate {size} on {held.device}"
    else:
        asked = f"tried to allocate {kind if failure.asked_bytes is None else f'{size} of {kind}'}"
    free, total = (
        (held.free_device_bytes, held.total_device_bytes)
        if failure.place == "device"
        else (held.free_host_bytes, held.host_total_bytes)
    )
    left = f", {format_size(free)} free" if free is not None else ""
    shortage = Shortage(
        failure.place,
        need_bytes=max(0, failure.asked_bytes - (free or 0)) or None if failure.asked_bytes else None,
        free_device_bytes=held.free_device_bytes,
        free_host_bytes=held.free_host_bytes,
        unexplained_bytes=held.activations_bytes,
    )
    hopeless = total is not None and failure.asked_bytes is not None and failure.asked_bytes > total
    found = remedies(known.workload, known.config, shortage) if known is not None and not hopeless else []
    lines = [f"Out of memory: {asked}{left}; {where}", *held_lines(held, failure.place)]
    if hopeless:
        way = f"no setting makes room for it, as there are {format_size(total or 0)} in all: see what computes it"
        lines.append(f"What to change: {way}, in the traceback")
    else:
        way = f"try {found[0].short(shortage.where)}" if found else ""
        lines += _advice(failure, held, known, found, shortage)
    ran_out = "GPU memory" if failure.place == "device" else kind
    return Explanation(tuple(lines), f"out of {ran_out}: {asked}{left} ({where}){way and '; '}{way}")


def _advice(
    failure: Failure, held: Held, known: Known | None, found: Sequence[Remedy], shortage: Shortage
) -> Iterator[str]:
    lines = [f"  {line}" for line in remedy_lines(found, shortage)]
    pieces = held.cached_bytes
    if failure.place == "device" and failure.asked_bytes and pieces is not None and pieces >= failure.asked_bytes:
        lines.append(
            f"  torch's allocator has {format_size(pieces)} free, in pieces that are too small: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment"
        )
    if failure.place == "host" and known is not None and known.config.device == "cuda" and not found:
        lines.append(
            "  Nothing in the config lowers this: the engine keeps little in host memory here. Look at data loading "
            "(each process of a DataLoader's num_workers holds its own data set) and at what the script keeps"
        )
    if failure.place == "host" and held.address_space is not None:
        lines.append("  The limit on address space (ulimit -v) counts what is reserved, too: raise it, or take it away")
    if lines:
        stays = f" (the global batch of {known.config.global_batch} stays)" if found and known is not None else ""
        yield f"What to change{stays}:"
    yield from lines


def _shared(failure: Failure, held: Held, where: str) -> Explanation:
    total, free = held.shared_bytes or (0, 0)
    size = f"/dev/shm has {format_size(total)}, {format_size(free)} free"
    way = (
        "use fewer num_workers in the DataLoader, or give it more (docker run --shm-size=8g; mount -o remount,size=8G)"
    )
    asked = f"tried to allocate {format_size(failure.asked_bytes)}; " if failure.asked_bytes is not None else ""
    lines = (f"Out of shared memory: {asked}{where}", f"  {size}", f"What to change: {way}")
    return Explanation(lines, f"out of shared memory: {size} ({where}); {way}")
