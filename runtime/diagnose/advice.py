"""Explains a memory plan in sentences: where ZeRO costs memory, what fits, and the smallest change that makes it
fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from runtime.plan import Layout, find, stage_layout
from runtime.plan.constants import SNAPSHOT_SLOT_BYTES, SNAPSHOT_SLOTS
from runtime.plan.workload import Workload
from runtime.wire.sizes import format_size

MOST_GPUS = 4096
"""Largest number of GPUs that the advice suggests."""
_NOTABLE = 0.01
"""Relative differences below this (mostly padding) are not mentioned."""
_LARGE_COPY = 1 << 30
"""Checkpoint copies of fewer bytes are not mentioned."""
_TIGHT = 0.92
"""Share of the VRAM above which a layout is called tight, as a part of it is estimated."""


def advise(
    workload: Workload,
    layouts: Sequence[Layout],
    chosen: Layout | None = None,
    vram_bytes: int | None = None,
    host_ram_bytes: int | None = None,
) -> list[str]:
    """Sentences about the layouts of `plan(workload)`; `chosen`: the layout that the user's config gives."""
    lines = [*_costs(workload, layouts), *_small_states(workload, layouts), *_traffic(workload, layouts)]
    of_the_host = _one_memory if workload.device == "cpu" else _offload
    lines += of_the_host(workload, layouts, chosen, host_ram_bytes)
    lines += _snapshot(workload, layouts, chosen)
    if vram_bytes is not None:
        lines += _fits(workload, layouts, chosen, vram_bytes, host_ram_bytes)
    return lines


def _snapshot(workload: Workload, layouts: Sequence[Layout], chosen: Layout | None) -> Iterator[str]:
    """The host memory that asynchronous checkpoints take."""
    layout = chosen if chosen is not None and chosen.stage is not None else find(layouts, 2)
    ranks, nbytes = workload.world_size, layout.snapshot_bytes
    if nbytes >= _LARGE_COPY:
        each = f" ({ranks} ranks on one node, {format_size(nbytes / ranks)} each)" if ranks > 1 else ""
        what = "a copy of the states"
        if layout.offload:
            slots = nbytes == ranks * SNAPSHOT_SLOTS * SNAPSHOT_SLOT_BYTES
            what = "slots for streaming offloaded states" if slots else "a copy of the states that aren't offloaded"
        memory = "host RAM" if workload.device == "cpu" else "pinned host RAM"
        yield (
            f"Checkpoints are written while training continues, from {what}: at {layout.label} "
            f"{format_size(nbytes)} of additional {memory}{each}. If the host has less, "
            "they are streamed piece by piece, and a step may wait."
        )


def _costs(workload: Workload, layouts: Sequence[Layout]) -> Iterator[str]:
    """Names stages that take more memory than plain data parallelism, or more than the stage below."""
    plain, rank = find(layouts, None), _rank(workload)
    stages = [find(layouts, stage) for stage in range(4)]
    if workload.world_size == 1:
        least = min((layout for layout in layouts if layout.offload), key=lambda layout: layout.gpu_bytes)
        extra = " and ".join(
            f"stage {layout.stage} adds {format_size(layout.variable_bytes - stages[0].variable_bytes)}"
            for layout in stages[2:]
        )
        offload = (
            f" Only offload lowers VRAM: {least.label} takes {format_size(least.gpu_bytes)} "
            f"instead of {format_size(stages[0].gpu_bytes)}."
        )
        yield (
            f"With one {rank} there is nothing to shard, so stages 1 to 3 save no memory ({extra} in buffers)."
            f"{offload if workload.device == 'cuda' else ''}"
        )
        return
    for layout in stages:
        more = layout.variable_bytes - plain.variable_bytes
        if more > _NOTABLE * plain.variable_bytes:
            yield (
                f"ZeRO costs memory here: {layout.label} takes {format_size(more)} per {rank} more than plain data "
                f"parallelism ({_reason(workload, layout)})."
            )
    for below, layout in itertools.pairwise(stages[1:]):
        more = layout.variable_bytes - below.variable_bytes
        if more > _NOTABLE * below.variable_bytes:
            yield (
                f"{layout.label.capitalize()} takes {format_size(more)} per {rank} more than {below.label}: "
                f"{_reason(workload, layout)}."
            )


def _rank(workload: Workload) -> str:
    return "GPU" if workload.device == "cuda" else "rank"


def _reason(workload: Workload, layout: Layout) -> str:
    padding = workload.padded_parameters / workload.parameters - 1
    if padding > 0.05:
        return f"the units are so small that padding to 64 elements per rank adds {padding:.0%}"
    if layout.gpu["buffers"]:
        return f"buffers take {format_size(layout.gpu['buffers'])}: they hold unsharded units, of which there are few"
    return "parameters in 16 bit, masters and gradients in fp32"


def _small_states(workload: Workload, layouts: Sequence[Layout]) -> Iterator[str]:
    whole, rank = find(layouts, 0), _rank(workload)
    if whole.state_bytes < 0.25 * whole.gpu_bytes:
        names = ("activations", "logits", "temporary", "context")
        batch_bytes = whole.gpu["activations"] + whole.gpu["logits"]
        smaller = (
            " A smaller micro-batch saves more." if workload.micro_batch > 1 and batch_bytes > whole.state_bytes else ""
        )
        rest = ", ".join(f"{name} {format_size(whole.gpu[name])}" for name in names if whole.gpu[name])
        yield (
            f"The states are only {format_size(whole.state_bytes)} of about {format_size(whole.gpu_bytes)} per "
            f"{rank} ({rest}), and only states can be sharded or offloaded: no stage and no offload saves more than "
            f"that. Stage 0 is the simplest choice.{smaller}"
        )


def _traffic(workload: Workload, layouts: Sequence[Layout]) -> Iterator[str]:
    if workload.world_size == 1:
        return
    rank = _rank(workload)
    one, two, three = (find(layouts, stage) for stage in (1, 2, 3))
    steps = workload.accumulation
    if two.sent_bytes > one.sent_bytes:
        yield (
            f"With {steps} micro-steps stage 2 sends {format_size(two.sent_bytes)} per {rank} and step, stage 1 "
            f"{format_size(one.sent_bytes)}: stage 2 reduces at every micro-step, because it keeps only its own shard."
        )
    yield (
        f"Stage 3 all-gathers every unit twice per micro-step: {format_size(three.sent_bytes)} sent per {rank} and "
        f"step, {three.sent_bytes / two.sent_bytes:.1f} times stage 2."
    )


def _one_memory(
    workload: Workload, layouts: Sequence[Layout], chosen: Layout | None, host_ram_bytes: int | None
) -> Iterator[str]:
    """Advice for ranks on CPUs, which share the host's memory."""
    ranks = workload.world_size
    if chosen is not None and (chosen.offload or chosen.offload_parameters):
        yield (
            f"Ranks on a CPU train in host memory, so offload saves nothing: {format_size(chosen.host_bytes / ranks)} "
            "per rank count as offloaded."
        )
    if host_ram_bytes is not None:
        shown = [one for one in layouts if one is chosen or not (one.offload or one.offload_parameters)]
        sizes = {one.label: ranks * one.gpu_bytes + one.host_bytes for one in shown}
        fitting = [f"{label} ({format_size(size)})" for label, size in sizes.items() if size <= host_ram_bytes]
        what_fits = f"{', '.join(fitting)} fit{'s' if len(fitting) == 1 else ''}" if fitting else "none of these fits"
        yield f"In {format_size(host_ram_bytes)} of host RAM, not counting the processes themselves: {what_fits}."


def _offload(
    workload: Workload, layouts: Sequence[Layout], chosen: Layout | None, host_ram_bytes: int | None
) -> Iterator[str]:
    meant = chosen is not None and (chosen.offload or chosen.offload_parameters)
    layout = chosen if chosen is not None and meant else find(layouts, 2, offload=True)
    ranks = workload.world_size
    kind = "pinned host RAM" if layout.pinned_bytes == layout.host_bytes else "host RAM"
    yield (
        f"{layout.label.capitalize()} keeps {format_size(layout.host_bytes)} in {kind}"
        f"{f' ({ranks} ranks on one node, {format_size(layout.host_bytes / ranks)} each)' if ranks > 1 else ''}, "
        f"not counting the processes themselves, and copies {format_size(layout.pcie_bytes)} per GPU and step."
    )
    if layout.stage == 0 and ranks > 1:
        yield f"At stage 0 every rank offloads all states, {ranks} copies on one host; at stage 1 there is one copy."
    if host_ram_bytes is not None:
        offloads = [one for one in layouts if one.offload]
        too_much = [one for one in offloads if one.host_bytes > host_ram_bytes]
        if too_much:
            yield (
                f"Host RAM of {format_size(host_ram_bytes)} is not enough for "
                + ", ".join(f"{one.label} ({format_size(one.host_bytes)})" for one in too_much)
                + "."
            )
        else:
            most = max(one.host_bytes for one in offloads)
            enough = f"Host RAM of {format_size(host_ram_bytes)} is enough for every offload"
            yield f"{enough} ({format_size(most)} at most)."


def _fits(
    workload: Workload, layouts: Sequence[Layout], chosen: Layout | None, vram_bytes: int, host_ram_bytes: int | None
) -> Iterator[str]:
    def fits(layout: Layout) -> bool:
        return layout.gpu_bytes <= vram_bytes and (host_ram_bytes is None or layout.host_bytes <= host_ram_bytes)

    fitting = [layout.label for layout in layouts if fits(layout)]
    what_fits = f"{', '.join(fitting)} fit{'s' if len(fitting) == 1 else ''}" if fitting else "none of these fits"
    yield f"In {format_size(vram_bytes)} of VRAM: {what_fits}."
    wanted = chosen if chosen is not None else find(layouts, None)
    if fits(wanted):
        share = wanted.gpu_bytes / vram_bytes
        tight = "; that is tight, and a part of it is estimated" if share > _TIGHT else ""
        yield f"{wanted.label.capitalize()} fits: about {share:.0%} of the VRAM{tight}."
        return
    short = wanted.gpu_bytes - vram_bytes
    what = f"{format_size(short)} of VRAM" if short > 0 else "host RAM"
    change = smallest_change(workload, wanted, fits)
    way_out = f"The smallest change that fits: {change}." if change else f"Nothing up to {MOST_GPUS} GPUs fits."
    yield f"{wanted.label.capitalize()} does not fit: {what} short. {way_out}"


def smallest_change(workload: Workload, wanted: Layout, fits: Callable[[Layout], bool]) -> str | None:
    """The least intrusive change that makes the layout fit, in words; None if nothing does.

    Tried in this order: a higher stage up to 2 (same results, hardly slower), a smaller micro-batch with more
    accumulation (same global batch), stage 3, offload, both with the smallest micro-batch, and doubling the GPUs.
    """
    stage = wanted.stage or 0
    higher = range(stage + 1, 3)
    for option in higher:
        if fits(stage_layout(workload, option, wanted.offload)):
            return f"stage {option}{' + offload' if wanted.offload else ''}"
    smaller = smaller_micro_batches(workload)
    kept_stages = dict.fromkeys((stage, *higher))
    for one in smaller:
        for option in kept_stages:
            if fits(stage_layout(one, option, wanted.offload)):
                at = f"stage {option}, " if option != stage or wanted.stage is None else ""
                return at + _micro_batch_words(one)
    for option, offload in (
        (3, wanted.offload),
        *((option, True) for option in (max(1, stage), 2, 3) if option >= stage),
    ):
        if fits(stage_layout(workload, option, offload)):
            return f"stage {option}{' + offload' if offload else ''}"
    for offload in (False, True):
        if smaller and fits(stage_layout(smaller[-1], 3, offload)):
            return f"stage 3{' + offload' if offload else ''}, {_micro_batch_words(smaller[-1])}"
    gpus = workload.world_size
    while gpus < MOST_GPUS:
        gpus = min(2 * gpus, MOST_GPUS)
        for one in (workload, *smaller[-1:]):
            for offload in (wanted.offload, True):
                if fits(stage_layout(dataclasses.replace(one, world_size=gpus), 3, offload)):
                    batch = f", {_micro_batch_words(one)}" if one is not workload else ""
                    return f"{gpus} GPUs at stage 3{' + offload' if offload else ''}{batch}"
    return None


def smaller_micro_batches(workload: Workload) -> list[Workload]:
    """Workloads with the same global batch in smaller micro-batches, largest micro-batch first."""
    product = workload.micro_batch * workload.accumulation
    sizes = [size for size in range(workload.micro_batch - 1, 0, -1) if product % size == 0]
    return [dataclasses.replace(workload, micro_batch=size, accumulation=product // size) for size in sizes]


def _micro_batch_words(workload: Workload) -> str:
    steps = workload.accumulation
    return f"train_micro_batch_size_per_gpu {workload.micro_batch} with gradient_accumulation_steps {steps}"
