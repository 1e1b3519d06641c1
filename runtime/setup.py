"""From a model, a config and a process group to the parts of an engine: units, flats, rules, and the run they belong
to."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.comm import Comm
from runtime.config import ConfigError, Resolved
from runtime.memory import Ledger
from runtime.optim.optimizer import ZeroOptimizer
from runtime.optim.rules import Rule
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import Hello
from runtime.wire.rundir import ATTEMPT_VARIABLE, RESUME_VARIABLE, RUN_VARIABLE, RunFile, boot_id, read_run
from runtime.zero.cut import Cut, UnitError, cut, reduce_order
from runtime.zero.stage import STAGES, StagePolicy
from runtime.zero.unit import BufferPool, Flat

log = logging.getLogger("runtime.setup")

TRAINABLE = (torch.float32, torch.bfloat16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Session:
    """The run that this process is a rank of; without ZEROTOP_RUN there is none, and telemetry does nothing."""

    rank: int
    local_rank: int
    link: Telemetry | NullTelemetry
    """Commands, events and the heartbeat."""
    recorder: Telemetry | NullTelemetry
    """What the training thread writes to; does nothing under zerotop.telemetry.enabled = false."""
    folder: Path | None = None
    run: RunFile | None = None
    attempt: int = 1
    resume: bool = False
    step: Callable[[], int] = lambda: 0
    """The engine's finished steps, for a goodbye from outside the engine."""

    @classmethod
    def join(cls, rank: int, telemetry_enabled: bool = True) -> Session:
        """The session of this process; it stays reachable through `current_session`."""
        global _current
        link = Telemetry.from_environment(rank)
        session = cls(
            rank, int(os.environ.get("LOCAL_RANK", "0")), link, link if telemetry_enabled else NullTelemetry()
        )
        if name := os.environ.get(RUN_VARIABLE):
            session.folder, session.run = Path(name), read_run(Path(name))
            session.attempt = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
            session.resume = os.environ.get(RESUME_VARIABLE) == "1"
        _current = session
        return session

    def hello(self, config: Resolved, comm: Comm, module: nn.Module, start_step: int, knobs: dict[str, Any]) -> Hello:
        device_name, device_uuid = platform.machine(), ""
        if comm.device.type == "cuda":
            properties = torch.cuda.get_device_properties(comm.device)
            device_name, device_uuid = properties.name, f"GPU-{properties.uuid}"
        section = config.zerotop
        scripted = self.run is not None and self.run.script is not None
        return Hello(
            run=self.run.name if self.run else "",
            attempt=self.attempt,
            rank=comm.rank,
            local_rank=self.local_rank,
            world_size=comm.world_size,
            host=platform.node(),
            pid=os.getpid(),
            boot_id=boot_id(),
            wall_s=time.time(),
            mono_ns=time.monotonic_ns(),
            device=str(comm.device),
            device_name=device_name,
            device_uuid=device_uuid,
            backend=comm.backend,
            config_digest=config.digest(),
            model_name=type(module).__name__
            if scripted
            else section.model.preset or section.model.path or type(module).__name__,
            parameters=sum(p.numel() for p in module.parameters()),
            stage=config.stage,
            precision=config.precision,
            micro_batch=config.micro_batch,
            accumulation=config.accumulation,
            global_batch=config.global_batch,
            seq_len=None if scripted else section.data.seq_len,
            steps=section.train.steps,
            start_step=start_step,
            torch_version=torch.__version__,
            telemetry_hz=section.telemetry.hz,
            knobs=knobs,
        )


_current: Session | None = None


def current_session() -> Session | None:
    """The session that initialize() joined last, if any: how __main__ says goodbye for a script that failed."""
    return _current


@dataclass
class Assembly:
    """What an engine drives."""

    policy: StagePolicy
    flats: list[Flat] = field(default_factory=list)
    """In forward order, the root unit first: the order of updates and gathers."""
    reduce_order: list[Flat] = field(default_factory=list)
    frozen: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)


def assemble(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm, ledger: Ledger) -> Assembly:
    """Cut `module` into units and move its parameters into flat buffers (rank 0's values everywhere).

    Raises ConfigError for what the model or config can't have, on every rank alike.
    """
    _same_model_everywhere(module, config, optimizer, comm)
    _check_parameters(module, config, optimizer)
    if detach := getattr(module, "_zerotop_detach", None):
        detach()  # an earlier engine on the same model must not go on taking its gradients
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    parts = Assembly(STAGES[config.stage])
    precision = DTYPES[config.precision]
    module.to(comm.device)
    _cast_buffers(module, precision, comm, ledger)
    parts.frozen = [(name, p) for name, p in module.named_parameters() if p not in group_of or not p.requires_grad]
    frozen = {p for _, p in parts.frozen}
    left_out = sum(parameter.requires_grad for _, parameter in parts.frozen)
    if left_out and comm.rank == 0:
        log.warning(f"{left_out} parameters require a gradient and are in no optimizer group: they stay as they are")
    for _, parameter in parts.frozen:
        parameter.requires_grad_(False)
        parameter.data = ledger.hold("parameters", _cast(parameter.data, precision))
        comm.broadcast_bytes(parameter.data)
    try:
        cuts = cut(module, list(config.zerotop.units) if config.zerotop.units else None)
    except UnitError as error:
        raise ConfigError(str(error)) from None
    accumulate = DTYPES[config.grad_accum_dtype]
    pool = BufferPool(accumulate, comm.device, ledger)
    by_cut: dict[int, list[Flat]] = {}
    for index, unit in enumerate(cuts):
        by_cut[index] = [
            Flat(
                f"{unit.name}/{str(dtype).removeprefix('torch.')}",
                members,
                dtype,
                parts.policy,
                comm,
                ledger,
                pool,
                accumulate,
            )
            for dtype, members in _by_dtype(unit, group_of, frozen, precision).items()
        ]
        parts.flats += by_cut[index]
    parts.reduce_order = [flat for index in reduce_order(cuts) for flat in by_cut[index]]
    if not parts.flats:
        raise ConfigError("the model has no trainable parameter in the optimizer: nothing to train")
    parts.rules = [optimizer.make_rule(flat, ledger) for flat in parts.flats]
    return parts


def _by_dtype(
    unit: Cut, group_of: dict[nn.Parameter, int], frozen: set[nn.Parameter], precision: torch.dtype
) -> dict[torch.dtype, list[tuple[str, nn.Parameter, int]]]:
    """A unit's trainable parameters by the dtype they will compute in, ordered by optimizer group."""
    members: dict[torch.dtype, list[tuple[str, nn.Parameter, int]]] = {}
    for name, parameter in unit.parameters:
        if parameter not in frozen:
            dtype = _computes_in(parameter.dtype, precision)
            members.setdefault(dtype, []).append((name, parameter, group_of[parameter]))
    return {dtype: sorted(found, key=lambda member: member[2]) for dtype, found in members.items()}


def _computes_in(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """Under 16-bit precision every parameter is 16-bit, as in DeepSpeed; under fp32 a model keeps the dtypes it came
    with."""
    return dtype if precision == torch.float32 else precision


def _cast(tensor: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    return tensor.to(_computes_in(tensor.dtype, precision)) if tensor.is_floating_point() else tensor


def _cast_buffers(module: nn.Module, precision: torch.dtype, comm: Comm, ledger: Ledger) -> None:
    """Floating buffers follow the precision, as scripts written for DeepSpeed expect; batch norm keeps its statistics
    in fp32."""
    for owner in module.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is None:
                continue
            if not isinstance(owner, nn.modules.batchnorm._NormBase):
                owner._buffers[name] = _cast(buffer, precision)
            held = owner._buffers[name]
            assert held is not None
            comm.broadcast_bytes(held)
            ledger.hold("buffers", held)


def _check_parameters(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer) -> None:
    """What would train nothing, or fail at the first step with torch's words instead of ours."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    foreign = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ConfigError(
            f"{foreign} parameters of the optimizer are not in the model: make the optimizer from "
            "model.parameters() after "
            "the last change of the model, and give modules with parameters of their own to "
            "initialize() inside the model"
        )
    for parameter, name in names.items():
        if config.precision == "fp32" and parameter.requires_grad and parameter.dtype not in TRAINABLE:
            raise ConfigError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: expected float32 "
                "or bfloat16; call "
                'model.float() before initialize(), or set "bf16": {"enabled": true}'
            )


def _same_model_everywhere(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm) -> None:
    """Collectives over buffers of different sizes hang or corrupt: compare the models first, and name the first
    difference."""
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    mine = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad, group_of.get(p)) for name, p in module.named_parameters()
    ]
    mine += [(f"(buffer) {name}", tuple(b.shape), str(b.dtype), False, None) for name, b in module.named_buffers()]
    gathered = comm.gather_objects((config.digest(), mine))
    for rank, (digest, _) in enumerate(gathered):
        if digest != gathered[0][0]:
            raise ConfigError(
                f"the ranks disagree about the config: rank 0 has {gathered[0][0]}, rank {rank} has {digest}"
            )
    everyone = [parameters for _, parameters in gathered]
    for rank, theirs in enumerate(everyone):
        if theirs == everyone[0]:
            continue
        for first, other in zip(everyone[0], theirs, strict=False):
            if first != other:
                raise ConfigError(
                    f"the ranks disagree about the model: rank 0 has parameter {_parameter(first)}, rank "
                    f"{rank} has {_parameter(other)}"
                )
        raise ConfigError(
            f"the ranks disagree about the model: rank 0 has {len(everyone[0])} parameters, rank {rank} has "
            f"{len(theirs)}"
        )


def _parameter(entry: tuple[str, tuple[int, ...], str, bool, int | None]) -> str:
    name, shape, dtype, trainable, group = entry
    kind = "" if trainable else " (frozen)"
    return f"{name} {list(shape)} {dtype.removeprefix('torch.')}{kind}{'' if group is None else f' in group {group}'}"
