"""What a run will take: bytes per GPU and on the host, and bytes sent per step, for every ZeRO stage. Torch-free.

With Psi parameters on N ranks, Adam and 16-bit parameters with fp32 masters, ZeRO's own table (arXiv 1910.02054,
section 5) counts 16 Psi bytes per GPU at stage 0, 4 Psi + 12 Psi / N at 1, 2 Psi + 14 Psi / N at 2 and 16 Psi / N at 3,
with gradients in 16 bit. Gradients that accumulate in fp32, as here by default, take 4 bytes instead of 2.

States (parameters, gradients, masters, optimizer) are exact for this engine's layout: every unit is padded to
64 elements per rank. What the engine keeps in flight is a bound from the same layout. Activations, logits and context
are estimates and marked so (runtime/estimate.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from runtime.estimate import activation_bytes, context_bytes, logits_bytes
from runtime.models.presets import GPTConfig
from runtime.zero.layout import kept_on_device, padded

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STAGES = (0, 1, 2, 3)
REDUCTIONS_IN_FLIGHT = 1
"""As runtime/zero/schedule.py has it; a test compares."""
SLOTS = 2
"""Buffers in each direction that copies between GPU and host pass through, as runtime/zero/downlink.py has them."""
SNAPSHOT_SLOT_BYTES = 2 * (32 << 20)
"""Of a rank whose states are offloaded, as runtime/checkpoint/snapshot.py has them; a test compares."""

EVERYWHERE = ("root", "small")
"""Units that are open for gradients through the whole backward: see runtime/zero/cut.py."""

CATEGORIES = ("parameters", "gradients", "masters", "optimizer", "buffers", "activations", "logits", "context")
EXACT = ("parameters", "gradients", "masters", "optimizer")
"""Categories that follow from the layout alone; the others depend on what runs when, or are estimates."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A model and how it is trained. `units` are (name, parameters) in forward order, as the engine cuts the model."""

    name: str
    units: tuple[tuple[str, int], ...]
    shape: GPTConfig | None
    """None: a model of the user's own, whose activations and logits are not known and count as nothing."""
    world_size: int
    precision: str = "bf16"
    grad_accum_dtype: str = "fp32"
    reduce_dtype: str | None = None
    """Precision in which gradients travel and wait to be reduced. None: that of the model from stage 2 on, else that in
    which they accumulate."""
    moments: int = 2
    """fp32 state tensors per parameter that the optimizer keeps: 2 for Adam."""
    micro_batch: int = 1
    accumulation: int = 1
    seq_len: int = 1024
    offload_ratio: float = 1.0
    """Share of the states that offload moves to the host, as near as whole units come to it."""
    offload_parameters: bool = False
    """Whether at stage 3 offload moves the parameters, too."""
    pin_memory: bool = True
    segments: int | None = None
    """Groups of layers whose activations backward computes again. None: all activations are kept."""
    shape_guessed: bool = False
    checkpoints: bool = True
    """Whether any are written beside training."""

    def __post_init__(self) -> None:
        for field in ("world_size", "micro_batch", "accumulation", "seq_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("precision", "grad_accum_dtype"):
            if getattr(self, field) not in ELEMENT_BYTES:
                raise ValueError(f"{field}: expected one of {', '.join(ELEMENT_BYTES)}, got {getattr(self, field)!r}")
        if self.reduce_dtype is not None and self.reduce_dtype not in ELEMENT_BYTES:
            raise ValueError(f"reduce_dtype: expected one of {', '.join(ELEMENT_BYTES)}, got {self.reduce_dtype!r}")
        if not 0 <= self.offload_ratio <= 1:
            raise ValueError(f"offload_ratio must be between 0 and 1, got {self.offload_ratio}")
        if not self.units or any(numel < 0 for _, numel in self.units):
            raise ValueError("units must name at least one unit, none with a negative size")

    @property
    def parameters(self) -> int:
        return sum(numel for _, numel in self.units)

    @property
    def padded_parameters(self) -> int:
        return sum(padded(numel, self.world_size) for _, numel in self.units)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.precision]

    @property
    def accumulator_bytes(self) -> int:
        return ELEMENT_BYTES[self.grad_accum_dtype]

    def reduced_bytes(self, stage: int) -> int:
        """Per element of a gradient that travels."""
        return ELEMENT_BYTES[self.reduce_dtype or (self.precision if stage >= 2 else self.grad_accum_dtype)]

    @property
    def small_parameters(self) -> int:
        """Padded; whole on every rank also at stage 3."""
        return sum(padded(numel, self.world_size) for name, numel in self.units if name == "small")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """One way to run the workload. Bytes are per GPU (`gpu`) and for all ranks on one node (`host`), per category."""

    stage: int | None
    """None: plain data parallelism (torch's DDP), the thing to compare with."""
    offload: bool
    gpu: dict[str, int]
    host: dict[str, int]
    sent_bytes: int
    """Sent by each rank per optimizer step, with ring collectives."""
    pcie_bytes: int
    """Copied between each GPU and its host per optimizer step, both directions together."""
    pinned: bool = False
    snapshot_bytes: int = 0
    """Page-locked host memory of all ranks on one node from which checkpoints are written beside training. Where the
    host has less, they are written from the states themselves: so it is not part of `host`."""

    @property
    def label(self) -> str:
        if self.stage is None:
            return "data parallel"
        return f"stage {self.stage}{' + offload' if self.offload else ''}"

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, masters and optimizer states on the GPU: the part that ZeRO shares out."""
        return sum(self.gpu[category] for category in EXACT)

    @property
    def variable_bytes(self) -> int:
        """States and what the engine keeps in flight: what differs between layouts."""
        return self.state_bytes + self.gpu["buffers"]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layout": self.label,
            "stage": self.stage,
            "offload_optimizer": self.offload,
            "gpu_bytes": self.gpu_bytes,
            "gpu_bytes_by_category": self.gpu,
            "host_bytes": self.host_bytes,
            "host_bytes_by_category": self.host,
            "host_pinned_bytes": self.host_bytes if self.pinned else 0,
            "host_checkpoint_bytes": self.snapshot_bytes,
            "sent_bytes_per_step": self.sent_bytes,
            "pcie_bytes_per_step": self.pcie_bytes,
        }


def plan(workload: Workload) -> list[Layout]:
    """Plain data parallelism, then stages 0-3, then stages 0-3 with the optimizer offloaded to the host."""
    staged = [stage_layout(workload, stage, offload) for offload in (False, True) for stage in STAGES]
    return [data_parallel(workload), *staged]


def data_parallel(workload: Workload) -> Layout:
    """torch's DDP with autocast: parameters, gradients and Adam's moments in fp32, 16 bytes per parameter.

    Assumes gradient_as_bucket_view=True (without it DDP holds the gradients twice) and one all-reduce per step
    (no_sync while accumulating). In 16 bit autocast keeps a cast copy of the weights from forward to backward.
    """
    count, world = workload.parameters, workload.world_size
    cast_copy = ELEMENT_BYTES[workload.precision] * count if workload.precision != "fp32" else 0
    states = {"parameters": 4 * count, "gradients": 4 * count, "masters": 0}
    states |= {"optimizer": 4 * workload.moments * count, "buffers": cast_copy}
    sent = _ring(2 * 4 * count, world)
    return Layout(None, False, states | _unshared(workload), {}, sent, 0)


def stage_layout(workload: Workload, stage: int, offload: bool = False) -> Layout:
    """This engine at a ZeRO stage, with the masters and optimizer states on the GPU or (offload) on the host."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of 0, 1, 2, 3, got {stage!r}")
    world = workload.world_size
    whole = workload.padded_parameters
    owned = whole if stage == 0 else whole // world
    offloaded = offloaded_ranges(workload, stage) if offload else {}
    on_host = sum(offloaded.values())
    on_gpu = owned - on_host
    waits = offload and workload.offload_parameters and stage == 3
    waiting = _gathered(workload) // world if waits else 0
    apart = _masters_apart(workload, offloaded, waits) if offload else (0, 0)
    masters = (4 * on_gpu, 4 * on_host) if workload.precision != "fp32" else apart
    moments = 4 * workload.moments
    accumulator = workload.accumulator_bytes
    gpu = {
        "parameters": workload.element_bytes * (_kept_at_stage_3(workload) - waiting if stage == 3 else whole),
        "gradients": accumulator * (whole if stage < 2 else on_gpu),
        "masters": masters[0],
        "optimizer": moments * on_gpu,
        "buffers": _in_flight(workload, stage, shards=world > 1 or waiting > 0),
    }
    host: dict[str, int] = {}
    if offload:
        per_rank = {"gradients": accumulator * on_host if stage >= 2 else 0, "masters": masters[1]}
        per_rank |= {"optimizer": moments * on_host, "parameters": workload.element_bytes * waiting}
        per_rank |= {"staging": _staging(workload, stage, max(offloaded.values(), default=0))}
        host = {category: size * world for category, size in per_rank.items()}
    pinned = offload and workload.pin_memory
    sent = _sent(workload, stage)
    pcie = _pcie(workload, stage, on_host, waiting)
    snapshot = _snapshot(workload, stage, offloaded)
    return Layout(stage, offload, gpu | _unshared(workload), host, sent, pcie, pinned, snapshot)


def _snapshot(workload: Workload, stage: int, offloaded: dict[str, int]) -> int:
    """Bytes on one node: every rank copies masters and optimizer states of its own range, at every stage. What offload
    keeps on the host is read through slots instead. Buffers and frozen parameters are not in it.
    (runtime/checkpoint/snapshot.py)"""
    if not workload.checkpoints:
        return 0
    world = workload.world_size
    apart = sum(offloaded.values()) // (world if stage == 0 else 1)
    copied = (4 + 4 * workload.moments) * (workload.padded_parameters // world - apart)
    return world * (copied + (SNAPSHOT_SLOT_BYTES if apart else 0))


def _unshared(workload: Workload) -> dict[str, int]:
    """What no stage changes."""
    element, shape, batch = ELEMENT_BYTES[workload.precision], workload.shape, workload.micro_batch
    activations = logits = 0
    if shape is not None:
        activations = activation_bytes(shape, batch, workload.seq_len, element, workload.segments)
        logits = logits_bytes(shape, batch, workload.seq_len, element)
    return {"activations": activations, "logits": logits, "context": context_bytes(workload.world_size)}


def offloaded_ranges(workload: Workload, stage: int) -> dict[str, int]:
    """Elements of each unit's states that a rank keeps on the host; whole units, those that are needed last."""
    sharers = 1 if stage == 0 else workload.world_size
    ranges = {name: padded(numel, workload.world_size) // sharers for name, numel in workload.units if numel}
    stays = kept_on_device(list(ranges.values()), workload.offload_ratio)
    return {name: numel for (name, numel), stay in zip(ranges.items(), stays, strict=True) if not stay}


def _masters_apart(workload: Workload, offloaded: dict[str, int], waits: bool) -> tuple[int, int]:
    """Bytes on the GPU and on the host of masters of fp32 parameters, which are their own masters unless parameters and
    states live apart. `waits`: parameters that are gathered live on the host."""
    everything = offloaded_ranges(dataclasses.replace(workload, offload_ratio=1.0), 3) if waits else {}
    gathered = everything.keys() - {"small"}
    on_gpu = sum(numel for name, numel in everything.items() if name in gathered and name not in offloaded)
    on_host = sum(numel for name, numel in offloaded.items() if name not in gathered)
    return 4 * on_gpu, 4 * on_host


def _gathered(workload: Workload) -> int:
    """Padded elements that stage 3 gathers."""
    return workload.padded_parameters - workload.small_parameters


def _kept_at_stage_3(workload: Workload) -> int:
    """Elements: the own ranges, and what is too small to gather."""
    return _gathered(workload) // workload.world_size + workload.small_parameters


def _two_largest(workload: Workload) -> int:
    """Elements of the two largest units that open and close."""
    sizes = (padded(numel, workload.world_size) for name, numel in workload.units if name not in EVERYWHERE)
    return sum(sorted(sizes, reverse=True)[:2])


def _in_flight(workload: Workload, stage: int, shards: bool) -> int:
    """Most that the engine holds beside the states.

    Stages 0 and 1 reduce in place in the accumulators (through a copy of two units where gradients travel in another
    precision). From stage 2 on whole gradients live in a pool (see `pool_elements`). Stage 3 also holds the gathered
    parameters of two units and the root, where it `shards` them. Ranges on their way to the host wait in the pool.
    """
    two, reduced = _two_largest(workload), workload.reduced_bytes(stage)
    if stage < 2:
        return 0 if reduced == workload.accumulator_bytes else reduced * two
    root = sum(padded(numel, workload.world_size) for name, numel in workload.units if name == "root")
    gathered = workload.element_bytes * (two + root) if stage == 3 and shards else 0
    return reduced * pool_elements(workload) + gathered


def pool_elements(workload: Workload) -> int:
    """Elements of all whole-gradient buffers that one backward borrows: played through as runtime/zero does.

    The root and the small parameters have buffers of their own; the other units are filled last to first.
    REDUCTIONS_IN_FLIGHT are being reduced while the next is filled. A buffer that is given back is lent again if it is
    large enough, the smallest that is; else it makes room for a larger one.
    """
    order = [numel for name, numel in reversed(workload.units) if name not in EVERYWHERE]
    held = sum(padded(numel, workload.world_size) for name, numel in workload.units if name in EVERYWHERE)
    most, free, flying = held, list[int](), list[int]()
    for numel in (padded(numel, workload.world_size) for numel in order if numel):
        fitting = [size for size in free if size >= numel]
        if fitting:
            buffer = min(fitting)
            free.remove(buffer)
        else:
            held += numel - (free.pop(0) if free else 0)
            most = max(most, held)
            buffer = numel
        if len(flying) == REDUCTIONS_IN_FLIGHT:
            free.append(flying.pop(0))
        flying.append(buffer)
    return most


def _staging(workload: Workload, stage: int, largest: int) -> int:
    """Host memory that copies pass through: slots for the gradients and for the new parameters of the largest range."""
    down = workload.accumulator_bytes
    if stage >= 2:  # after no_sync gradients travel as they accumulated, if nothing is said about it
        down = ELEMENT_BYTES[workload.reduce_dtype] if workload.reduce_dtype else max(down, workload.element_bytes)
    return SLOTS * (down + workload.element_bytes) * largest


def _ring(size: int, world_size: int) -> int:
    """Bytes each rank sends to reduce-scatter or all-gather `size` bytes around a ring (an all-reduce is both)."""
    return size * (world_size - 1) // world_size


def _sent(workload: Workload, stage: int) -> int:
    """Sent per rank and optimizer step.

    Stage 0 all-reduces the gradients; 1 reduce-scatters them and gathers the new parameters; 2 reduce-scatters at every
    micro-step; 3 also gathers at every forward and every backward, and so need not at the end.
    """
    element, reduced = workload.element_bytes, workload.reduced_bytes(stage)
    small = workload.small_parameters
    per_element = {
        0: 2 * reduced,
        1: reduced + element,
        2: workload.accumulation * reduced + element,
        3: workload.accumulation * (reduced + 2 * element),
    }[stage]
    regathered = (2 * workload.accumulation - 1) * element * small if stage == 3 else 0  # of small ones: once a step
    return _ring(per_element * workload.padded_parameters - regathered, workload.world_size)


def _pcie(workload: Workload, stage: int, on_host: int, waiting: int) -> int:
    """Copied per rank and step: gradients down (from stage 2 on at every micro-step), new parameters up. Parameters
    that wait on the host come up for every forward and backward instead."""
    down = workload.accumulation * workload.reduced_bytes(stage) if stage >= 2 else workload.accumulator_bytes
    gathers = 2 * workload.accumulation * workload.element_bytes * waiting
    return (down + workload.element_bytes) * on_host - workload.element_bytes * min(waiting, on_host) + gathers


def workload_document(workload: Workload) -> dict[str, Any]:
    """For JSON."""
    document = dataclasses.asdict(workload)
    document["units"] = [{"name": name, "parameters": numel} for name, numel in workload.units]
    return document | {"parameters": workload.parameters, "padded_parameters": workload.padded_parameters}


def find(layouts: Sequence[Layout], stage: int | None, offload: bool = False) -> Layout:
    """The layout of that stage in what `plan` returned."""
    return next(layout for layout in layouts if layout.stage == stage and layout.offload == offload)
