"""From a model, a config and a process group to the parts of an engine: units, flats, rules, and the run they belong
to."""

from __future__ import annotations

import json
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
from runtime.diagnose import outofmemory
from runtime.host.ledger import Ledger
from runtime.models.names import plain_name
from runtime.offload.placement import Placing, Size, place, transfers_for
from runtime.optim.optimizer import ZeroOptimizer
from runtime.optim.shard_optimizer import Rule
from runtime.state.precision import DTYPES
from runtime.telemetry import NullTelemetry, Telemetry, stopsignal
from runtime.wire.messages import Hello
from runtime.wire.rundir import ATTEMPT_VARIABLE, RESUME_VARIABLE, RUN_VARIABLE, RunFile, boot_id, read_run
from runtime.zero.cut import Cut, UnitError, cut, reduce_order
from runtime.zero.flat import Flat, Member
from runtime.zero.gradients import GradientNumbers, Gradients
from runtime.zero.pool import BufferPool
from runtime.zero.stage import StagePolicy, policy_for
from runtime.zero.unit import Unit
from runtime.zero.values import Values, adopt

log = logging.getLogger("runtime.setup")

TRAINABLE = (torch.float32, torch.bfloat16)
ARENA_SLACK = 1 << 28
"""Bytes: shared memory is reserved, not used, and every buffer starts on a page."""


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
    number: int = 1
    """Counts the engines of this process in this run. The run watches and steers the first; later ones have telemetry
    that does nothing, and checkpoints in a folder of their own."""

    @classmethod
    def join(cls, rank: int, telemetry_enabled: bool = True) -> Session:
        """The session of this process, which stays reachable through `current_session`; or that of a later engine."""
        global _current
        number = 1 + _begun.get(os.environ.get(RUN_VARIABLE, ""), 0)
        link = Telemetry.from_environment(rank) if number == 1 else NullTelemetry()
        session = cls(
            rank, int(os.environ.get("LOCAL_RANK", "0")), link, link if telemetry_enabled else NullTelemetry()
        )
        session.number = number
        if name := os.environ.get(RUN_VARIABLE):
            session.folder, session.run = Path(name), read_run(Path(name))
            session.attempt = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
            session.resume = os.environ.get(RESUME_VARIABLE) == "1"
        if number == 1:
            _current = session
            stopsignal.spare_data_workers()
        return session

    @classmethod
    def apart(cls, rank: int) -> Session:
        """Of an engine that does not train: the run neither watches nor steers it, and it is none of its engines."""
        return cls(rank, int(os.environ.get("LOCAL_RANK", "0")), NullTelemetry(), NullTelemetry(), number=0)

    def begin(self, hello: Hello) -> None:
        """The engine is complete: from now on it counts."""
        run = os.environ.get(RUN_VARIABLE, "")
        if run:
            _begun[run] = _begun.get(run, 0) + 1
        self.link.start(hello)

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
_begun: dict[str, int] = {}
"""Engines of this process, by run."""


def current_session() -> Session | None:
    """The session that initialize() joined first, if any: how __main__ says goodbye for a script that failed."""
    return _current


@dataclass
class Assembly:
    """What an engine drives."""

    policy: StagePolicy
    numbers: GradientNumbers
    units: list[Unit] = field(default_factory=list)
    """In forward order, the root unit and the small parameters first."""
    reduce_order: list[Flat] = field(default_factory=list)
    frozen: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """Parameters that are not trained and whole on every rank; at stage 3 large ones are in their units."""
    rules: list[Rule] = field(default_factory=list)
    placing: Placing = field(init=False)
    pool: BufferPool = field(init=False)

    @property
    def flats(self) -> list[Flat]:
        """Trained ones, in the order of updates and gathers."""
        return [flat for unit in self.units for flat in unit.flats]


def assemble(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer, comm: Comm, ledger: Ledger) -> Assembly:
    """Cut `module` into units and move its parameters into flat buffers (rank 0's values everywhere), one unit at a
    time, so that no device ever holds more than its part and one unit.

    Raises ConfigError for what the model or config can't have, on every rank alike.
    """
    _same_model_everywhere(module, config, optimizer, comm)
    _check_parameters(module, config, optimizer)
    values = _values(module, comm)
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    precision = DTYPES[config.precision]
    frozen = _freeze(module, group_of, comm)
    try:
        patterns = list(config.zerotop.units) if config.zerotop.units else None
        cuts = cut(module, patterns, config.persistence_threshold)
    except UnitError as error:
        raise ConfigError(str(error)) from None
    outofmemory.remember(module, config, comm.device, ledger, cuts)
    parts = Assembly(policy_for(config.stage, config.zerotop.accumulate == "local"), _numbers(config, comm.world_size))
    if comm.world_size > 1:
        comm.share_memory(16 * sum(p.numel() for p in module.parameters()) + ARENA_SLACK)
    _place_buffers(module, DTYPES.get(config.zerotop.buffer_dtype or ""), comm, ledger, values)
    dtypes = _dtypes(module, precision)
    offloads = config.offload_optimizer is not None or config.offload_param is not None
    transfers = transfers_for(comm.device) if offloads else None
    # Alone, a rank has nobody to share parameters with; they can still be elsewhere.
    shards = comm.world_size > 1 or (config.offload_param is not None and transfers is not None)
    specs = _specs(cuts, parts, shards, group_of, frozen, dtypes)
    sizes = [Size(sum(p.numel() for _, p, _ in s.members), s.dtype, s.trained, s.sharded) for s in specs]
    parts.placing = place(
        config,
        parts.policy,
        comm,
        ledger,
        parts.numbers,
        sizes,
        optimizer.kind in ("Adam", "AdamW"),
        transfers,
    )
    parts.pool = BufferPool(comm, ledger)
    for index, spec in enumerate(specs):
        _make_flat(index, spec, parts, comm, ledger, values)
    for name, parameter in parts.frozen:
        _place_frozen(name, parameter, dtypes[parameter], comm, ledger, values)
    parts.reduce_order = [flat for index in reduce_order(cuts) for flat in parts.units[index].flats]
    if optimizer.trains and not parts.flats:
        raise ConfigError("the model has no trainable parameter in the optimizer: nothing to train")
    sides = [parts.placing.rule_side(index) for index, spec in enumerate(specs) if spec.trained]
    parts.rules = [optimizer.make_rule(flat, ledger, side) for flat, side in zip(parts.flats, sides, strict=True)]
    return parts


@dataclass
class _Spec:
    """A flat to be."""

    unit: Unit
    members: list[Member]
    dtype: torch.dtype
    trained: bool
    sharded: bool


def _specs(
    cuts: list[Cut],
    parts: Assembly,
    shards: bool,
    group_of: dict[nn.Parameter, int],
    frozen: set[nn.Parameter],
    dtypes: dict[nn.Parameter, torch.dtype],
) -> list[_Spec]:
    """All flats in forward order; makes the units, and notes the frozen parameters that are in none. shards: whether
    stage 3 has anything to do."""
    specs = []
    for unit_cut in cuts:
        unit = Unit(unit_cut.name, unit_cut.modules, stays=unit_cut.everywhere)
        parts.units.append(unit)
        sharded = parts.policy.own_parameters and shards and unit_cut.name != "small"
        for trained in (True, False):
            for dtype, members in _by_dtype(unit_cut, group_of, frozen, dtypes, trained).items():
                if trained or sharded:
                    specs.append(_Spec(unit, members, dtype, trained, sharded))
                else:
                    parts.frozen += [(name, parameter) for name, parameter, _ in members]
    return specs


def _make_flat(index: int, spec: _Spec, parts: Assembly, comm: Comm, ledger: Ledger, values: Values) -> None:
    placing, unit = parts.placing, spec.unit
    home = placing.home(index)
    name = f"{unit.name}/{str(spec.dtype).removeprefix('torch.')}{'' if spec.trained else '/frozen'}"
    flat = Flat(
        name, spec.members, spec.dtype, parts.policy, spec.sharded, comm, ledger, values, home, spec.trained,
        placing.own_host, placing.transfers,
    )  # fmt: skip
    if spec.trained:
        downlink = placing.downlink if home.remote else None
        flat.gradients = Gradients(
            flat.layout, parts.policy, spec.dtype, parts.numbers, parts.pool, home, unit.stays, downlink
        )  # fmt: skip
    (unit.flats if spec.trained else unit.frozen).append(flat)


def _values(module: nn.Module, comm: Comm) -> Values:
    """What one rank lacks is every rank's error, or the others would wait for it."""
    values, problem = None, ""
    try:
        values = Values.of(module, comm.rank)
    except ConfigError as error:
        problem = str(error)
    problems = [found for found in comm.gather_objects(problem) if found]
    if problems or values is None:
        raise ConfigError(problems[0])
    return values


def _numbers(config: Resolved, world_size: int) -> GradientNumbers:
    communicate = config.communication_data_type
    return GradientNumbers(
        DTYPES[config.grad_accum_dtype],
        DTYPES[communicate] if communicate else None,
        1 / world_size if config.prescale_gradients else 1 / config.gradient_predivide_factor,
    )


def _freeze(module: nn.Module, group_of: dict[nn.Parameter, int], comm: Comm) -> set[nn.Parameter]:
    """The parameters that are not trained; from now on none of them requires a gradient."""
    frozen = {p for p in module.parameters() if p not in group_of or not p.requires_grad}
    left_out = sum(parameter.requires_grad for parameter in frozen)
    if left_out and group_of and comm.rank == 0:
        log.warning(f"{left_out} parameters require a gradient and are in no optimizer group: they stay as they are")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _by_dtype(
    unit: Cut,
    group_of: dict[nn.Parameter, int],
    frozen: set[nn.Parameter],
    dtypes: dict[nn.Parameter, torch.dtype],
    trained: bool,
) -> dict[torch.dtype, list[Member]]:
    """A unit's trained (or frozen) parameters by the dtype they will compute in, ordered by optimizer group."""
    members: dict[torch.dtype, list[Member]] = {}
    for name, parameter in unit.parameters:
        if (parameter not in frozen) == trained:
            members.setdefault(dtypes[parameter], []).append((name, parameter, group_of.get(parameter, 0)))
    return {dtype: sorted(found, key=lambda member: member[2]) for dtype, found in members.items()}


def _dtypes(module: nn.Module, precision: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """What each parameter computes in. Under 16-bit precision that is 16 bit, as in DeepSpeed; but a norm with running
    statistics wants weight and bias in the dtype of those, as under autocast. Under fp32 a model keeps the dtypes that
    it came with."""
    found = {
        p: precision if precision != torch.float32 and p.dtype.is_floating_point else p.dtype
        for p in module.parameters()
    }
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_mean is not None:
            found |= dict.fromkeys(norm.parameters(recurse=False), norm.running_mean.dtype)
    return found


def _place_frozen(
    name: str, parameter: nn.Parameter, dtype: torch.dtype, comm: Comm, ledger: Ledger, values: Values
) -> None:
    """A frozen parameter that every rank holds whole: to the device, rank 0's values."""
    found = values.read(name, parameter, 0, parameter.numel())
    # Its own memory: what a checkpoint changes later must not reach into a script's tensors.
    data = torch.empty(parameter.shape, dtype=dtype, device=comm.device)
    if found is not None:
        data.view(-1).copy_(found)
    if values.needs_broadcast(parameter):
        comm.broadcast_bytes(data)
    adopt(parameter, ledger.hold("parameters", data))


def _place_buffers(module: nn.Module, dtype: torch.dtype | None, comm: Comm, ledger: Ledger, values: Values) -> None:
    """To the device, rank 0's values. dtype: of floating-point ones; None: as they came. One that several modules share
    stays one."""
    placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, so that its id is nobody else's
    for path, owner in module.named_modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is None:
                continue
            if id(buffer) not in placed:
                held = values.buffer(f"{path}.{name}" if path else name, buffer).to(comm.device)
                if held.is_floating_point() and dtype is not None:
                    held = held.to(dtype)
                placed[id(buffer)] = buffer, held
                comm.broadcast_bytes(held)
                ledger.hold("buffers", held)
            owner._buffers[name] = placed[id(buffer)][1]


def check_complete(module: nn.Module) -> None:
    """Raises ConfigError for lazy modules, whose parameters have no shape yet."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(
                f"{plain_name(name)} has no shape yet (a Lazy module of torch): run one forward of the model with real "
                "inputs before initialize()"
            )


def _check_parameters(module: nn.Module, config: Resolved, optimizer: ZeroOptimizer) -> None:
    """What would train nothing, or fail at the first step with torch's words instead of ours."""
    names = {parameter: plain_name(name) for name, parameter in module.named_parameters()}
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
    """Collectives over buffers of different sizes hang or corrupt, and other numbers train another model on each rank:
    compare first, and name the first difference."""
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    mine = [
        (plain_name(name), tuple(p.shape), str(p.dtype), p.requires_grad, group_of.get(p))
        for name, p in module.named_parameters()
    ]
    mine += [
        (f"(buffer) {plain_name(name)}", tuple(b.shape), str(b.dtype), False, None)
        for name, b in module.named_buffers()
    ]
    told = comm.gather_objects((config.to_json(), optimizer.described(), mine))
    gathered = [(Resolved.from_json(text), described, parameters) for text, described, parameters in told]
    first_config, first_optimizer, _ = gathered[0]
    for rank, (other, described, _) in enumerate(gathered):
        if (found := first_config.difference(other)) is not None:
            key, zeroth, theirs = found
            raise ConfigError(
                f"the ranks disagree about the config: {key} is {json.dumps(zeroth)} on rank 0 and "
                f"{json.dumps(theirs)} on rank {rank}"
            )
        for name in [*first_optimizer, *(name for name in described if name not in first_optimizer)]:
            zeroth, theirs = first_optimizer.get(name, "not there"), described.get(name, "not there")
            if zeroth != theirs:
                raise ConfigError(
                    f"the ranks disagree about the optimizer: {name} is {zeroth} on rank 0 and {theirs} on rank {rank}"
                )
    everyone = [parameters for _, _, parameters in gathered]
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
