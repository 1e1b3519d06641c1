"""Memory and communication of a run at every ZeRO stage: bytes per GPU, on the host, and sent per step. Torch-free.

With Psi parameters on N ranks, Adam and 16-bit parameters with fp32 masters, ZeRO's own table (arXiv 1910.02054,
section 5) counts 16 Psi bytes per GPU at stage 0, 4 Psi + 12 Psi / N at 1, 2 Psi + 14 Psi / N at 2 and 16 Psi / N at 3,
with gradients in 16 bit. Gradients that accumulate in fp32, as here by default, take 4 bytes instead of 2.

States (parameters, gradients, masters, optimizer) are exact for this engine's layout: every unit is padded to
64 elements per rank. Buffers of the engine are an upper bound from the same layout. Activations, logits and context
are estimates (runtime/plan/estimate.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from runtime.plan.constants import OFFLOAD_SLOTS, SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS, STREAM_SLOTS
from runtime.plan.estimate import (
    activation_bytes,
    context_bytes,
    fresh_gradient_bytes,
    kept_input_bytes,
    logits_bytes,
    offloaded_bytes,
)
from runtime.plan.inflight import borrowed_for_backward, copied_for_reduction, unsharded_params
from runtime.plan.layout import STATE_BYTES, keep_mask, offload_mask, padded
from runtime.plan.traffic import pcie_bytes, ring_bytes, sent_bytes
from runtime.plan.workload import ELEMENT_BYTES, Workload

STAGES = (0, 1, 2, 3)

CATEGORIES = (
    "parameters", "gradients", "masters", "optimizer", "buffers", "activations", "logits", "temporary", "context",
)  # fmt: skip
"""buffers: the most that the engine holds beside the states. temporary: gradients in autograd's own memory, as far as
they add to activations and logits."""
EXACT = ("parameters", "gradients", "masters", "optimizer")
"""Categories that are exact; the others are bounds or estimates."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """One way to run the workload. Bytes are per GPU (`gpu`) and for all ranks on one node (`host`), per category."""

    stage: int | None
    """None: plain data parallelism (torch's DDP), for comparison."""
    offload: bool
    """Whether optimizer states are offloaded."""
    gpu: dict[str, int]
    host: dict[str, int]
    sent_bytes: int
    """Bytes that each rank sends per optimizer step, with ring collectives."""
    pcie_bytes: int
    """Bytes copied between each GPU and its host per optimizer step, in both directions together."""
    offload_parameters: bool = False
    pinned_bytes: int = 0
    """The part of `host` that is page-locked."""
    snapshot_bytes: int = 0
    """Pinned host memory of all ranks on one node from which checkpoints are written while training goes on. It is not
    in `host`, because checkpoints are written from the states themselves if the host has less."""

    @property
    def label(self) -> str:
        """The layout's name in tables."""
        if self.stage is None:
            return "data parallel"
        moved = " + offload" if self.offload else " + offload_param" if self.offload_parameters else ""
        return f"stage {self.stage}{moved}"

    @property
    def gpu_bytes(self) -> int:
        """Bytes per GPU, all categories."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of all ranks on the host, all categories."""
        return sum(self.host.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters, gradients, masters and optimizer states on the GPU: what ZeRO shards."""
        return sum(self.gpu[category] for category in EXACT)

    @property
    def variable_bytes(self) -> int:
        """Bytes of states and the engine's buffers on the GPU: what differs between layouts."""
        return self.state_bytes + self.gpu["buffers"]

    def document(self) -> dict[str, Any]:
        """The layout as JSON."""
        return {
            "layout": self.label,
            "stage": self.stage,
            "offload_optimizer": self.offload,
            "offload_param": self.offload_parameters,
            "gpu_bytes": self.gpu_bytes,
            "gpu_bytes_by_category": self.gpu,
            "host_bytes": self.host_bytes,
            "host_bytes_by_category": self.host,
            "host_pinned_bytes": self.pinned_bytes,
            "host_checkpoint_bytes": self.snapshot_bytes,
            "sent_bytes_per_step": self.sent_bytes,
            "pcie_bytes_per_step": self.pcie_bytes,
        }


def plan(workload: Workload) -> list[Layout]:
    """Layouts of plain data parallelism, stages 0-3, stages 0-3 with offloaded optimizer and, if the workload offloads
    parameters, stage 3 with only the parameters offloaded."""
    staged = [stage_layout(workload, stage, offload) for offload in (False, True) for stage in STAGES]
    if workload.offload_parameters:
        staged.append(stage_layout(workload, 3, offload=False, parameters=True))
    return [data_parallel(workload), *staged]


def data_parallel(workload: Workload) -> Layout:
    """torch's DDP with autocast: parameters, gradients and Adam's moments in fp32, 16 bytes per parameter. Frozen
    parameters are in the model's precision.

    Assumes gradient_as_bucket_view=True (without it DDP holds the gradients twice) and one all-reduce per step
    (no_sync while accumulating). In 16 bit autocast keeps a cast copy of the weights from forward to backward.
    """
    count, world = workload.trained_parameters, workload.world_size
    cast_copy = ELEMENT_BYTES[workload.precision] * count if workload.precision != "fp32" else 0
    frozen = workload.element_bytes * workload.frozen_parameters
    states = {"parameters": 4 * count + frozen, "gradients": 4 * count, "masters": 0}
    states |= {"optimizer": 4 * workload.moments * count, "buffers": cast_copy}
    sent = ring_bytes(2 * 4 * count, world)
    host = _inputs_on_host(workload)
    return Layout(None, False, states | _stage_independent(workload), host, sent, 0, pinned_bytes=sum(host.values()))


def stage_layout(workload: Workload, stage: int, offload: bool = False, parameters: bool | None = None) -> Layout:
    """This engine's layout at a ZeRO stage. offload: whether masters and optimizer states are on the host. parameters:
    whether parameters are offloaded at stage 3; None: with the states, if the workload says so."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of 0, 1, 2, 3, got {stage!r}")
    world, remote = workload.world_size, workload.device != "cpu"
    whole = workload.padded_parameters
    owned = whole if stage == 0 else whole // world
    offload_parameters = stage == 3 and (offload and workload.offload_parameters if parameters is None else parameters)
    shards = stage == 3 and (world > 1 or (offload_parameters and remote))
    frozen_whole, frozen_own = _frozen(workload, shards)
    waiting = frozen_waiting = 0
    if shards and offload_parameters:
        waiting, frozen_waiting, frozen_own = _shardable(workload) // world, frozen_own, 0
    offloaded = offloaded_shards(workload, stage, waiting > 0) if offload else {}
    on_host = sum(offloaded.values())
    on_gpu = owned - on_host
    shards_gradients = workload.shards_gradients(stage)
    masters = _masters(workload, on_gpu, offloaded, waiting > 0)
    moments = workload.moment_bytes * workload.moments
    accumulator = workload.accumulator_bytes
    streamed = _stream_bytes(workload) if offloaded else 0
    gpu = {
        "parameters": workload.element_bytes
        * (frozen_whole + frozen_own + (_kept_at_stage_3(workload) - waiting if stage == 3 else whole)),
        "gradients": accumulator * (on_gpu if shards_gradients else whole),
        "masters": masters[0],
        "optimizer": moments * on_gpu,
        "buffers": _in_flight(workload, stage, shards) + streamed,
    }
    pinned, host = 0, dict[str, int]()
    if offload or waiting:
        states = {"gradients": accumulator * on_host if shards_gradients else 0, "masters": masters[1]}
        states |= {"optimizer": moments * on_host}
        states |= {"staging": _staging(workload, shards_gradients, max(offloaded.values(), default=0)) if remote else 0}
        per_rank = states | {"parameters": workload.element_bytes * (waiting + frozen_waiting)}
        host = {category: size * world for category, size in per_rank.items()}
        if remote:
            pinned = workload.pin_memory * sum(states.values()) * world
            pinned += workload.pin_parameters * host["parameters"]
    host |= _inputs_on_host(workload)
    return Layout(
        stage=stage,
        offload=offload,
        gpu=gpu | _stage_independent(workload),
        host=host,
        sent_bytes=sent_bytes(workload, stage),
        pcie_bytes=pcie_bytes(workload, stage, on_host, waiting, frozen_waiting) if remote else 0,
        offload_parameters=offload_parameters,
        pinned_bytes=pinned + host.get("activations", 0),
        snapshot_bytes=_snapshot(workload, stage, offloaded),
    )


def _snapshot(workload: Workload, stage: int, offloaded: dict[str, int]) -> int:
    """Pinned bytes on one node for checkpoints: every rank copies the masters and optimizer states of its shard, at
    every stage; offloaded ones are read through slots instead. Buffers are not included, nor frozen parameters, which
    the trainer's own checkpoints leave out. (runtime/checkpoint/saving/snapshot.py)"""
    if not workload.checkpoints:
        return 0
    world = workload.world_size
    apart = sum(offloaded.values()) // (world if stage == 0 else 1)
    copied = (4 + workload.moment_bytes * workload.moments) * (workload.padded_parameters // world - apart)
    return world * (copied + (SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES if apart else 0))


def _stage_independent(workload: Workload) -> dict[str, int]:
    """Bytes of the categories that are the same at every stage."""
    element, shape, batch = ELEMENT_BYTES[workload.precision], workload.shape, workload.micro_batch
    activations = logits = temporary = 0
    if shape is not None:
        activations = activation_bytes(
            shape, batch, workload.seq_len, element, workload.segments, _offloads_inputs(workload)
        )
        logits = logits_bytes(shape, batch, workload.seq_len, element, workload.chunked_loss, workload.trains_head)
        temporary = fresh_gradient_bytes(
            shape, element, activations + logits, workload.largest_parameter, workload.tied_table
        )
    context = context_bytes(workload.world_size) if workload.device == "cuda" else 0
    return {"activations": activations, "logits": logits, "temporary": temporary, "context": context}


def _offloads_inputs(workload: Workload) -> bool:
    """Whether what layers keep is offloaded: not on a CPU, where it is in host memory already."""
    asked = workload.offload_activations or (workload.inputs_on_host and workload.segments is not None)
    return asked and workload.device != "cpu"


def _inputs_on_host(workload: Workload) -> dict[str, int]:
    """Bytes of offloaded activations of all ranks, which are page-locked."""
    shape = workload.shape
    if shape is None or not _offloads_inputs(workload):
        return {}
    element, batch, length = ELEMENT_BYTES[workload.precision], workload.micro_batch, workload.seq_len
    if workload.segments is None:
        kept = offloaded_bytes(shape, batch, length, element)
    else:
        kept = kept_input_bytes(shape, batch, length, element, workload.segments)
    return {"activations": kept * workload.world_size}


def offloaded_shards(workload: Workload, stage: int, params_on_host: bool = False) -> dict[str, int]:
    """Elements of each offloaded unit's states on a rank: full units, those that the forward needs last.
    params_on_host: whether stage 3's sharded parameters are offloaded, too."""
    sharers = 1 if stage == 0 else workload.world_size
    numels = {name: padded(numel, workload.world_size) // sharers for name, numel in workload.units if numel}
    keep = keep_mask(list(numels.values()), workload.offload_ratio)
    offload_each = offload_mask(list(numels.values()), keep, _room_for_states(workload, stage, params_on_host))
    return {name: numel for (name, numel), leave in zip(numels.items(), offload_each, strict=True) if leave}


def _room_for_states(workload: Workload, stage: int, params_on_host: bool) -> int:
    """Bytes of VRAM that zerotop.offload.vram_reserve_gib leaves to states (the same count as in
    offload/placement.py)."""
    reserve, free, world = workload.vram_reserve_bytes, workload.free_vram_bytes, workload.world_size
    if reserve is None or free is None or workload.device == "cpu":
        return 0
    whole, sharded = workload.padded_parameters, _shardable(workload)
    largest = [numel for _, numel in workload.padded_units]
    shards = stage == 3 and (world > 1 or params_on_host)
    frozen_whole, frozen_own = _frozen(workload, shards)
    kept = whole + frozen_whole
    if shards:
        kept = workload.small_parameters + frozen_whole + (0 if params_on_host else sharded // world + frozen_own)
        largest += [numel for _, numel in workload.padded_frozen]
    coming = workload.element_bytes * kept
    coming += workload.accumulator_bytes * (whole // world if workload.shards_gradients(stage) else whole)
    buffers = 2 * workload.element_bytes * sum(sorted(largest, reverse=True)[:2])
    return max(0, free - coming - _stream_bytes(workload) - buffers - reserve)


def _stream_bytes(workload: Workload) -> int:
    """Bytes of the GPU buffers through which offloaded states stream: masters, moments, gradients, new parameters."""
    if not workload.stream_chunk_bytes or workload.device == "cpu":
        return 0
    chunk = max(64, workload.stream_chunk_bytes // STATE_BYTES // 64 * 64)
    return STREAM_SLOTS * chunk * (STATE_BYTES + workload.accumulator_bytes + 4)


def _masters(workload: Workload, on_gpu: int, offloaded: dict[str, int], params_on_host: bool) -> tuple[int, int]:
    """Bytes of masters on the training device and on the host. fp32 parameters are their own masters unless parameters
    and states are in different memories. on_gpu: elements of states on the GPU. params_on_host: whether stage 3's
    sharded parameters are offloaded."""
    if workload.precision != "fp32":
        return 4 * on_gpu, 4 * sum(offloaded.values())
    if workload.device == "cpu":
        return 0, 0
    numels = {name: numel // workload.world_size for name, numel in workload.padded_units}
    moved = {name for name in numels if params_on_host and name != "small"}
    apart_on_gpu = sum(numels[name] for name in moved if name not in offloaded)
    return 4 * apart_on_gpu, 4 * sum(numel for name, numel in offloaded.items() if name not in moved)


def _frozen(workload: Workload, shards: bool) -> tuple[int, int]:
    """Elements of parameters that are not trained and that a rank keeps: whole, which take no padding, and in shards.
    shards: whether stage 3 shards parameters."""
    if not shards:
        return workload.frozen_parameters, 0
    small = sum(numel for name, numel in workload.frozen if name == "small")
    return small, sum(numel for _, numel in workload.padded_frozen) // workload.world_size


def _shardable(workload: Workload) -> int:
    """Padded elements of trained parameters that stage 3 shards."""
    return workload.padded_parameters - workload.small_parameters


def _kept_at_stage_3(workload: Workload) -> int:
    """Elements of trained parameters that a rank keeps at stage 3: its shards, and the small parameters."""
    return _shardable(workload) // workload.world_size + workload.small_parameters


def _in_flight(workload: Workload, stage: int, shards: bool) -> int:
    """Most bytes of buffers that the engine holds beside the states.

    Full accumulators are reduced in place, or through copies if the communication dtype is not theirs. Sharded
    gradients are reduced in full buffers from a pool, in which those that are downloaded to the host stay, too. Stage 3
    also unshards parameters, if it `shards` them.
    """
    units, reduced = workload.padded_units, workload.reduced_bytes(stage)
    if workload.shards_gradients(stage):
        nbytes = reduced * borrowed_for_backward(units, workload.arrivals)
    else:
        nbytes = 0 if reduced == workload.accumulator_bytes else reduced * copied_for_reduction(units)
    if not shards:
        return nbytes
    frozen = dict(workload.padded_frozen)
    gathered = [(name, numel + frozen.get(name, 0)) for name, numel in units]
    return nbytes + workload.element_bytes * unsharded_params(gathered)


def _staging(workload: Workload, shards_gradients: bool, largest: int) -> int:
    """Bytes of pinned slots for copies of gradients and new parameters, each as large as the largest shard."""
    down = workload.accumulator_bytes
    if shards_gradients:  # after no_sync gradients have the accumulation dtype, unless the config sets one
        down = ELEMENT_BYTES[workload.reduce_dtype] if workload.reduce_dtype else max(down, workload.element_bytes)
    return OFFLOAD_SLOTS * (down + workload.element_bytes) * largest


def find(layouts: Sequence[Layout], stage: int | None, offload: bool = False, parameters: bool = False) -> Layout:
    """The layout of a stage among those that `plan` returned. parameters: the one with only the parameters
    offloaded."""
    return next(
        layout
        for layout in layouts
        if (layout.stage, layout.offload) == (stage, offload) and (offload or layout.offload_parameters == parameters)
    )
