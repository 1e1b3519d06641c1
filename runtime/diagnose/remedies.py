"""What to change in a config when memory ran out, with what each change saves by the plan's arithmetic. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from runtime.diagnose.advice import smaller_micro_batches
from runtime.plan import EXACT, Layout, stage_layout
from runtime.plan.workload import Workload
from runtime.wire.sizes import format_size

if TYPE_CHECKING:
    from runtime.config import Resolved

MOST = 4
_NOTABLE = 0.01
"""Of what is held; a change that saves less would not help."""
_NEAR = 0.9
"""A lower stage that saves this part of what the best one saves is preferred: it sends less."""
OFFLOADED = {"device": "cpu", "pin_memory": True}


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change of the config."""

    changes: dict[str, tuple[Any, Any]]
    """Key of the config, dotted -> the value now (None: it isn't there) and the new one (None: take it out)."""
    saves_bytes: int | None
    """Per GPU, or on the host for all its ranks, whichever ran out. None: it depends on a model that isn't known."""
    note: str = ""

    @property
    def change(self) -> str:
        """In the user's keys: `"zero_optimization.stage": 0 -> 2`."""
        return ", ".join(_changed(key, old, new) for key, (old, new) in self.changes.items())

    def short(self, where: str = "") -> str:
        saves = "" if self.saves_bytes is None else f" (saves about {format_size(self.saves_bytes)}{where})"
        return f"{self.change}{saves}"

    def text(self, where: str = "") -> str:
        saves = "" if self.saves_bytes is None else f"saves about {format_size(self.saves_bytes)}{where}"
        return f"{self.change}: {', '.join(part for part in (saves, self.note) if part)}"


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Which memory ran out, and what is known about it. Bytes; None: not known."""

    place: Literal["device", "host"]
    need_bytes: int | None = None
    """What was asked for and not there."""
    free_device_bytes: int | None = None
    free_host_bytes: int | None = None
    unexplained_bytes: int | None = None
    """Held, and not by the engine: activations and temporary."""
    units_known: bool = True
    """False: only the number of parameters is known, so what is in flight counts as nothing."""

    @property
    def where(self) -> str:
        return " per GPU" if self.place == "device" else " on this host"


@dataclasses.dataclass(frozen=True)
class _Option:
    changes: dict[str, tuple[Any, Any]]
    workload: Workload
    stage: int
    offload: bool
    note: str = ""


def remedies(workload: Workload, config: Resolved, shortage: Shortage) -> list[Remedy]:
    """Changes that keep the results and the global batch and save memory where it ran out, best first, at most four."""
    now = _Option({}, workload, config.stage, config.offload_optimizer is not None)
    held = _held(now, config, shortage)
    found = []
    for option in _options(now, config, shortage):
        saved = held - _held(option, config, shortage)
        note = option.note
        if _offloads(option) != _offloads(now):
            note = _cost(option, now, shortage)
        if saved >= max(1, _NOTABLE * held) and _has_room(option, now, shortage):
            found.append(Remedy(option.changes, saved, note))
    found.sort(key=lambda remedy: -(remedy.saves_bytes or 0))
    unknown = _smaller_batch_of_unknown(workload, config, shortage)
    if unknown is not None:
        most = found[0].saves_bytes or 0 if found else 0
        found.insert(0 if (shortage.unexplained_bytes or 0) / 2 > most else len(found), unknown)
        found = found if found.index(unknown) < MOST else [*found[: MOST - 1], unknown]
    return found[:MOST]


def remedy_lines(found: Sequence[Remedy], shortage: Shortage) -> list[str]:
    """Numbered, for people."""
    lines = [f"{number}. {remedy.text(shortage.where)}" for number, remedy in enumerate(found, start=1)]
    need, known = shortage.need_bytes, [remedy.saves_bytes for remedy in found]
    if need and found and all(saves is not None and saves < need for saves in known):
        lines.append(f"None of these alone makes up for the {format_size(need)} that are missing.")
    return lines


# ---- what could be changed -------------------------------------------------------------------------------------------
def _options(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    workload, on_gpu = now.workload, config.device == "cuda"
    if shortage.place == "host" and on_gpu and not now.offload and not workload.offload_parameters:
        return  # the engine keeps nothing there
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
                "backward computes each block's forward again",
            )
    if on_gpu:
        yield from _more_offload(now)


def _higher_stage(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    options = [
        dataclasses.replace(now, changes={"zero_optimization.stage": (now.stage, stage)}, stage=stage)
        for stage in range(now.stage + 1, 4)
    ]
    held = {option.stage: _held(option, config, shortage) for option in options}
    most = _held(now, config, shortage) - min(held.values(), default=0)
    near = [one for one in options if _held(now, config, shortage) - held[one.stage] >= _NEAR * most]
    if near:
        yield dataclasses.replace(near[0], note="gathers parameters twice per micro-step" if near[0].stage == 3 else "")


def _smaller_batch(now: _Option, config: Resolved, shortage: Shortage) -> Iterator[_Option]:
    options = [
        _Option(_batch_changes(now.workload, one), one, now.stage, now.offload, "same global batch")
        for one in smaller_micro_batches(now.workload)
    ]
    held = _held(now, config, shortage)
    enough = [
        one for one in options if shortage.need_bytes and held - _held(one, config, shortage) > shortage.need_bytes
    ]
    halves = [one for one in options if 2 * one.workload.micro_batch <= now.workload.micro_batch]
    yield from (enough or halves)[:1]


def _smaller_batch_of_unknown(workload: Workload, config: Resolved, shortage: Shortage) -> Remedy | None:
    """For a script's model: what it keeps for backward isn't known, and shrinks with the micro-batch in any case."""
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
    return Remedy(
        _batch_changes(workload, halves[0]), None, f"activations take {share} of what they do; same global batch"
    )


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


def _held(option: _Option, config: Resolved, shortage: Shortage) -> int:
    """Bytes of the memory that ran out."""
    layout = _layout(option)
    on_device, on_host = _device_bytes(layout, shortage), _host_bytes(layout, shortage)
    if config.device == "cpu":  # host and device are one memory, of all ranks
        return on_device * option.workload.world_size + on_host
    return on_device if shortage.place == "device" else on_host


def _device_bytes(layout: Layout, shortage: Shortage) -> int:
    return layout.gpu_bytes if shortage.units_known else sum(layout.gpu[category] for category in EXACT)


def _host_bytes(layout: Layout, shortage: Shortage) -> int:
    return layout.host_bytes if shortage.units_known else layout.host_bytes - layout.host.get("staging", 0)


def _offloads(option: _Option) -> tuple[bool, bool, float]:
    return option.offload, option.workload.offload_parameters, option.workload.offload_ratio


def _both(option: _Option, shortage: Shortage) -> tuple[int, int]:
    layout = _layout(option)
    return _device_bytes(layout, shortage), _host_bytes(layout, shortage)


def _cost(option: _Option, now: _Option, shortage: Shortage) -> str:
    """What a move between device and host takes on the other side."""
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
        return f'"{key}": take it out'
    return f'"{key}": {json.dumps(new)}' if old is None else f'"{key}": {json.dumps(old)} -> {json.dumps(new)}'
