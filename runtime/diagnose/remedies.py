"""Config changes that help when memory ran out, with the savings of each by the plan's arithmetic. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from runtime.diagnose.advice import smaller_micro_batches
from runtime.plan import EXACT, Layout, stage_layout
from runtime.plan.decoder import DecoderShape, Kept
from runtime.plan.workload import Workload, is_adam
from runtime.wire.sizes import format_size

if TYPE_CHECKING:
    from runtime.config import Resolved

MOST = 4
"""Number of remedies to suggest at most."""
_NOTABLE = 0.01
"""Changes that save a smaller share of the memory in use are left out."""
_NEAR = 0.9
"""A lower stage that saves this share of the best stage's savings is preferred, as it communicates less."""
_SHORTEST = 512
"""Sequences of fewer tokens are not suggested."""
OFFLOADED = {"device": "cpu", "pin_memory": True}
"""The suggested value of an offload section."""


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change to the config."""

    changes: dict[str, tuple[Any, Any]]
    """Dotted config key -> (current value, None if unset; new value, None to remove the key)."""
    saves_bytes: int | None
    """Bytes saved per GPU, or on the host by all its ranks, whichever ran out; None: unknown for this model."""
    note: str = ""
    """What else the change means, such as its cost."""

    @property
    def change(self) -> str:
        """The change in the user's keys: `"zero_optimization.stage": 0 -> 2`."""
        return ", ".join(_changed(key, old, new) for key, (old, new) in self.changes.items())

    def short(self, where: str = "") -> str:
        """The change and what it saves, without the note. where: a suffix such as " per GPU"."""
        saves = "" if self.saves_bytes is None else f" (saves about {format_size(self.saves_bytes)}{where})"
        return f"{self.change}{saves}"

    def text(self, where: str = "") -> str:
        """The change, what it saves, and the note. where: a suffix such as " per GPU"."""
        saves = "" if self.saves_bytes is None else f"saves about {format_size(self.saves_bytes)}{where}"
        return f"{self.change}: {', '.join(part for part in (saves, self.note) if part)}"


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Which memory ran out, with figures in bytes (None: unknown)."""

    place: Literal["device", "host"]
    need_bytes: int | None = None
    """How much more the failed allocation needed than was free."""
    free_device_bytes: int | None = None
    free_host_bytes: int | None = None
    unexplained_bytes: int | None = None
    """Memory in use that the engine's ledger does not explain: activations and temporary tensors."""
    units_known: bool = True
    """False: only the number of parameters is known, so buffers of units count as zero."""

    @property
    def where(self) -> str:
        """Suffix for savings: " per GPU" or " on this host"."""
        return " per GPU" if self.place == "device" else " on this host"


@dataclasses.dataclass(frozen=True)
class _Option:
    changes: dict[str, tuple[Any, Any]]
    workload: Workload
    stage: int
    offload: bool
    note: str = ""


def remedies(workload: Workload, config: Resolved, shortage: Shortage) -> list[Remedy]:
    """Up to MOST changes that save memory where it ran out, best first. They change neither results nor global batch,
    except the last one of a Hugging Face model, which says what it changes."""
    now = _Option({}, workload, config.stage, config.offload_optimizer is not None)
    held = _held_bytes(now, config, shortage)

    def worth_it(options: Iterator[_Option]) -> list[Remedy]:
        found = []
        for option in options:
            saved = held - _held_bytes(option, config, shortage)
            note = option.note
            if _offloads(option) != _offloads(now):
                note = _cost(option, now, shortage)
            if saved >= max(1, _NOTABLE * held) and _has_room(option, now, shortage):
                found.append(Remedy(option.changes, saved, note))
        return sorted(found, key=lambda remedy: -(remedy.saves_bytes or 0))

    found = worth_it(_options(now, config, shortage))
    unknown = _smaller_batch_of_unknown(workload, config, shortage)
    if unknown is not None:
        most = found[0].saves_bytes or 0 if found else 0
        found.insert(0 if (shortage.unexplained_bytes or 0) / 2 > most else len(found), unknown)
        found = found if found.index(unknown) < MOST else [*found[: MOST - 1], unknown]
    others = worth_it(_other_results(now, config, shortage))
    return [*found[: MOST - min(1, len(others))], *others][:MOST]


def remedy_lines(found: Sequence[Remedy], shortage: Shortage) -> list[str]:
    """The remedies as numbered lines, and a warning if none of them alone is enough."""
    lines = [f"{number}. {remedy.text(shortage.where)}" for number, remedy in enumerate(found, start=1)]
    need, known = shortage.need_bytes, [remedy.saves_bytes for remedy in found]
    if need and found and all(saves is not None and saves < need for saves in known):
        lines.append(f"None of these alone saves the {format_size(need)} that are missing.")
    return lines


# ---- possible changes ------------------------------------------------------------------------------------------------
def _options(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    workload, on_gpu = now.workload, config.device == "cuda"
    if shortage.place == "host" and on_gpu and not now.offload and not workload.offload_parameters:
        return  # the engine keeps nothing in host memory
    yield from _higher_stage(now, config, shortage)
    if shortage.place == "host" and on_gpu:
        yield from _less_offload(now, config)
        return
    if workload.shape is not None:
        yield from _smaller_batch(now, config, shortage)
        if workload.segments is None:
            yield _Option(
                {"activation_checkpointing": (None, {})},
                dataclasses.replace(workload, segments=workload.shape.layers),
                now.stage,
                now.offload,
                "backward recomputes each block's forward",
            )
    if isinstance(workload.shape, DecoderShape):
        if not workload.chunked_loss:
            yield dataclasses.replace(
                now,
                changes={"zerotop.model.cross_entropy": ("whole", "auto")},
                workload=dataclasses.replace(workload, chunked_loss=True),
                note="the same loss, to rounding",
            )
        if on_gpu and not workload.offload_activations:
            moved = dataclasses.replace(workload, offload_activations=True)
            yield dataclasses.replace(now, changes={"zerotop.model.offload_activations": (None, True)}, workload=moved)
    if on_gpu:
        yield from _more_offload(now)


def _other_results(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    """Changes after which a Hugging Face model is trained to another result."""
    workload = now.workload
    if not isinstance(workload.shape, DecoderShape):
        return
    if config.zerotop.lora is None and not workload.frozen:
        yield dataclasses.replace(
            now,
            changes={"zerotop.lora": (None, {"r": 16})},
            workload=_with_adapters(workload, workload.shape),
            note="trains adapters instead of the model",
        )
    if is_adam(config) and workload.moment_bytes == 4 and not (now.offload and config.zerotop.offload.update == "gpu"):
        yield dataclasses.replace(
            now,
            changes={"zerotop.optimizer_state_dtype": (None, "bf16")},
            workload=dataclasses.replace(workload, moment_bytes=2, stream_chunk_bytes=0),
            note="rounds moments stochastically",
        )
    if workload.seq_len >= 2 * _SHORTEST and not (shortage.place == "host" and config.device == "cuda"):
        yield dataclasses.replace(
            now,
            changes={"zerotop.data.seq_len": (workload.seq_len, workload.seq_len // 2)},
            workload=dataclasses.replace(workload, seq_len=workload.seq_len // 2),
            note="longer samples are cut off",
        )


def _with_adapters(workload: Workload, shape: DecoderShape) -> Workload:
    """`workload` with LoRA on every linear layer. The adapters themselves, a hundredth of the parameters, count 0."""
    return dataclasses.replace(
        workload,
        shape=dataclasses.replace(shape, kept=Kept(norms=False, experts=False)),
        units=tuple((name, 0) for name, _ in workload.units),
        frozen=workload.units,
        arrivals=(),
        largest_parameter=0,
        tied_table=0,
        trains_head=False,
    )


def _higher_stage(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    options = [
        dataclasses.replace(now, changes={"zero_optimization.stage": (now.stage, stage)}, stage=stage)
        for stage in range(now.stage + 1, 4)
    ]
    held = {option.stage: _held_bytes(option, config, shortage) for option in options}
    most = _held_bytes(now, config, shortage) - min(held.values(), default=0)
    near = [one for one in options if _held_bytes(now, config, shortage) - held[one.stage] >= _NEAR * most]
    if near:
        yield dataclasses.replace(
            near[0], note="all-gathers parameters twice per micro-step" if near[0].stage == 3 else ""
        )


def _smaller_batch(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    options = [
        _Option(_batch_changes(now.workload, one), one, now.stage, now.offload, "same global batch")
        for one in smaller_micro_batches(now.workload)
    ]
    held = _held_bytes(now, config, shortage)
    enough = [
        one
        for one in options
        if shortage.need_bytes and held - _held_bytes(one, config, shortage) > shortage.need_bytes
    ]
    halves = [one for one in options if 2 * one.workload.micro_batch <= now.workload.micro_batch]
    yield from (enough or halves)[:1]


def _smaller_batch_of_unknown(workload: Workload, config: Resolved, shortage: Shortage) -> Remedy | None:
    """A smaller micro-batch for a script's model, whose activations are unknown but shrink with it."""
    if workload.shape is not None or (config.device == "cuda" and shortage.place == "host"):
        return None
    halves = [one for one in smaller_micro_batches(workload) if 2 * one.micro_batch <= workload.micro_batch]
    if not halves:
        return None
    share = (
        f"1/{workload.micro_batch // halves[0].micro_batch}"
        if workload.micro_batch % halves[0].micro_batch == 0
        else "less"
    )
    return Remedy(_batch_changes(workload, halves[0]), None, f"activations shrink to {share}; same global batch")


def _more_offload(now: _Option) -> Iterator[_Option]:
    changes = {} if now.offload else {"zero_optimization.offload_optimizer": (None, OFFLOADED)}
    if changes:
        whole = dataclasses.replace(now.workload, offload_ratio=1.0)
        yield _Option(changes, whole, now.stage, True)
    elif now.workload.offload_ratio < 1:
        ratio = {"zero_optimization.offload_optimizer.ratio": (now.workload.offload_ratio, 1.0)}
        yield _Option(ratio, dataclasses.replace(now.workload, offload_ratio=1.0), now.stage, True)
    if now.stage == 3 and not now.workload.offload_parameters:
        both = changes | {"zero_optimization.offload_param": (None, OFFLOADED)}
        yield _Option(both, dataclasses.replace(now.workload, offload_parameters=True), 3, True)


def _less_offload(now: _Option, config: Resolved) -> Iterator[_Option]:
    workload = now.workload
    if workload.offload_parameters:
        there = config.offload_param.model_dump() if config.offload_param is not None else None
        kept = dataclasses.replace(workload, offload_parameters=False)
        yield dataclasses.replace(now, changes={"zero_optimization.offload_param": (there, None)}, workload=kept)
    half = round(workload.offload_ratio / 2, 2)
    if half and now.offload:
        ratio = {"zero_optimization.offload_optimizer.ratio": (workload.offload_ratio, half)}
        yield dataclasses.replace(now, changes=ratio, workload=dataclasses.replace(workload, offload_ratio=half))


def _batch_changes(now: Workload, then: Workload) -> dict[str, tuple[Any, Any]]:
    return {
        "train_micro_batch_size_per_gpu": (now.micro_batch, then.micro_batch),
        "gradient_accumulation_steps": (now.accumulation, then.accumulation),
    }


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def _layout(option: _Option) -> Layout:
    return stage_layout(option.workload, option.stage, option.offload, option.workload.offload_parameters)


def _held_bytes(option: _Option, config: Resolved, shortage: Shortage) -> int:
    """Bytes that `option` takes of the memory that ran out."""
    layout = _layout(option)
    on_device, on_host = _device_bytes(layout, shortage), _host_bytes(layout, shortage)
    if config.device == "cpu":  # all ranks share the host's memory
        return on_device * option.workload.world_size + on_host
    return on_device if shortage.place == "device" else on_host


def _device_bytes(layout: Layout, shortage: Shortage) -> int:
    return layout.gpu_bytes if shortage.units_known else sum(layout.gpu[category] for category in EXACT)


def _host_bytes(layout: Layout, shortage: Shortage) -> int:
    return layout.host_bytes if shortage.units_known else layout.host_bytes - layout.host.get("staging", 0)


def _offloads(option: _Option) -> tuple[bool, bool, float, bool]:
    workload = option.workload
    return option.offload, workload.offload_parameters, workload.offload_ratio, workload.offload_activations


def _both(option: _Option, shortage: Shortage) -> tuple[int, int]:
    layout = _layout(option)
    return _device_bytes(layout, shortage), _host_bytes(layout, shortage)


def _cost(option: _Option, now: _Option, shortage: Shortage) -> str:
    """The memory that a move between device and host takes on the other side."""
    (device, host), (device_now, host_now) = _both(option, shortage), _both(now, shortage)
    if shortage.place == "device":
        return f"takes {format_size(host - host_now)} of host memory"
    return f"takes {format_size(device - device_now)} on each GPU"


def _has_room(option: _Option, now: _Option, shortage: Shortage) -> bool:
    (device, host), (device_now, host_now) = _both(option, shortage), _both(now, shortage)
    if shortage.place == "device":
        return shortage.free_host_bytes is None or host - host_now <= max(0, shortage.free_host_bytes)
    return shortage.free_device_bytes is None or device - device_now <= max(0, shortage.free_device_bytes)


def _changed(key: str, old: Any, new: Any) -> str:
    if new is None:
        return f'"{key}": remove it'
    return f'"{key}": {json.dumps(new)}' if old is None else f'"{key}": {json.dumps(old)} -> {json.dumps(new)}'
