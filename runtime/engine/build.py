"""Builds the training state of an engine from a model, a config and a process group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.comm import Comm
from runtime.config import ADAM, ConfigError, Resolved, bf16_states_need_adam
from runtime.diagnose import outofmemory
from runtime.engine.model_checks import check_parameters, check_same_model
from runtime.host.heap import trim
from runtime.host.ledger import Ledger
from runtime.offload.placement import FlatSize, Placement, choose_placement, transfers_for
from runtime.optim.optimizer import ZeroOptimizer
from runtime.optim.updates import Updates
from runtime.state.accumulation import Accumulation
from runtime.state.loss_scale import scaler_for
from runtime.state.precision import DTYPES
from runtime.state.train_state import TrainState, forget_update
from runtime.zero.cut import Cut, UnitError, cut, reduce_order
from runtime.zero.flat import FlatParamGroup, Member
from runtime.zero.full import FullModel
from runtime.zero.gradients import GradientConfig, Gradients
from runtime.zero.initial_values import Values, set_data
from runtime.zero.pool import BufferPool
from runtime.zero.reduce import GradReducer
from runtime.zero.script_changes import ScriptChanges
from runtime.zero.stage import StagePolicy, policy_for
from runtime.zero.state_placement import StatePlacement
from runtime.zero.unit import Unit
from runtime.zero.unshard import Unsharder

log = logging.getLogger("runtime.setup")

ARENA_SLACK = 1 << 28
"""Extra bytes of shared memory for page alignment of the buffers; reserved, not used."""


@dataclass
class _Parts:
    """The parts of the training state that is being built."""

    policy: StagePolicy
    gradients: GradientConfig
    comm: Comm
    ledger: Ledger
    pool: BufferPool
    values: Values
    units: list[Unit] = field(default_factory=list)
    frozen: list[tuple[str, nn.Parameter]] = field(default_factory=list)


def build_state(
    module: nn.Module,
    config: Resolved,
    optimizer: ZeroOptimizer,
    comm: Comm,
    guard: SnapshotGuard,
    script_begins: Callable[[], bool],
) -> TrainState:
    """Divide `module` into units and move its parameters into flat parameter groups, with rank 0's values on all ranks.
    Works unit by unit, so that no device ever holds more than its shards and one unit. Collective.

    guard: delays optimizer steps that a running save forbids. script_begins: called at the first gradient of a backward
    that the engine did not start; returns whether the loss is this engine's. Raises ConfigError on every rank for an
    unsupported model or config.
    """
    ledger = Ledger()
    check_same_model(module, config, optimizer, comm)
    check_parameters(module, config, optimizer)
    values = _values(module, comm)
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    frozen = _freeze(module, group_of, comm)
    try:
        patterns = list(config.zerotop.units) if config.zerotop.units else None
        cuts = cut(module, patterns, config.persistence_threshold)
    except UnitError as error:
        raise ConfigError(str(error)) from None
    outofmemory.record_engine(module, config, comm.device, ledger, cuts)
    parts = _Parts(
        policy_for(config.stage, config.zerotop.accumulate == "local"),
        _gradient_config(config, comm.world_size),
        comm,
        ledger,
        BufferPool(comm, ledger),
        values,
    )
    if comm.world_size > 1:
        comm.share_memory(16 * sum(p.numel() for p in module.parameters()) + ARENA_SLACK)
    _place_buffers(module, DTYPES.get(config.zerotop.buffer_dtype or ""), comm, ledger, values)
    dtypes = _dtypes(module, DTYPES[config.precision])
    offloads = config.offload_optimizer is not None or config.offload_param is not None
    transfers = transfers_for(comm.device) if offloads else None
    # A single rank has nothing to shard, but its parameters can be offloaded.
    shards = comm.world_size > 1 or (config.offload_param is not None and transfers is not None)
    specs = _specs(cuts, parts, shards, group_of, frozen, dtypes)
    sizes = [FlatSize(sum(p.numel() for _, p, _ in s.members), s.dtype, s.trained, s.sharded) for s in specs]
    adam = optimizer.kind in ADAM
    if optimizer.trains and not adam and config.zerotop.optimizer_state_dtype != "fp32":
        raise ConfigError(bf16_states_need_adam(optimizer.kind))
    frozen_bytes = sum(p.numel() * dtypes[p].itemsize for _, p in parts.frozen)
    placement = choose_placement(
        config, parts.policy, comm, ledger, parts.gradients, sizes, adam, transfers, frozen_bytes
    )
    if placement.grad_offload is not None and parts.policy.shards_gradients:
        comm.prepare_host_sums()
    for index, spec in enumerate(specs):
        _make_flat(spec, parts, placement, placement.of(index))
        trim()
    for name, parameter in parts.frozen:
        _place_frozen(name, parameter, dtypes[parameter], comm, ledger, values)
    flats = [flat for unit in parts.units for flat in unit.flats]
    if optimizer.trains and not flats:
        raise ConfigError("the optimizer holds no trainable parameter of the model, so there is nothing to train")
    uploads = [placement.upload_of(index) for index, spec in enumerate(specs) if spec.trained]
    shard_optimizers = [
        optimizer.make_shard_optimizer(flat, ledger, upload, DTYPES[config.zerotop.optimizer_state_dtype])
        for flat, upload in zip(flats, uploads, strict=True)
    ]
    order = [flat for index in reduce_order(cuts) for flat in parts.units[index].flats]
    reducer = GradReducer(order, comm, script_begins)
    # Before `updates`, whose hooks must run first: the latest hook of a module is the first to run.
    unsharder = Unsharder(
        module,
        parts.units,
        comm.telemetry,
        comm.gather_objects,
        before_unshard=lambda flat: updates.wait_for_shard(flat),
        before_change=guard.wait_for,
    )
    updates = Updates(
        module,
        parts.units,
        shard_optimizers,
        comm.telemetry,
        placement.executor,
        placement.upload.transfers.mark if placement.upload is not None else lambda: None,
        placement.overlap,
        on_idle=forget_update,
        before=guard.wait_for,
    )
    frozen_flats = [flat for unit in parts.units for flat in unit.frozen]
    return TrainState(
        module,
        config,
        comm,
        ledger,
        parts.policy,
        parts.units,
        parts.frozen,
        optimizer,
        shard_optimizers,
        scaler_for(config),
        Accumulation(optimizer.trains, config.managed_accumulation),
        reducer,
        unsharder,
        updates,
        FullModel(
            module, parts.units, unsharder, comm, updates.drain, guard.wait_for_all, [p for _, p in parts.frozen]
        ),
        ScriptChanges(module, flats, frozen_flats, parts.frozen, guard.wait_for_all, comm.rank == 0),
        parts.pool,
        parts.gradients.scale,
        placement.grad_offload,
        placement.transfers,
        placement.working_memory,
    )


@dataclass
class _Spec:
    """Describes a flat parameter group to be created."""

    unit: Unit
    members: list[Member]
    dtype: torch.dtype
    trained: bool
    sharded: bool


def _specs(
    cuts: list[Cut],
    parts: _Parts,
    shards: bool,
    group_of: dict[nn.Parameter, int],
    frozen: set[nn.Parameter],
    dtypes: dict[nn.Parameter, torch.dtype],
) -> list[_Spec]:
    """Create the units and describe all flat parameter groups, in forward order; frozen parameters outside of them go
    to `parts.frozen`. shards: whether stage 3 shards parameters here."""
    specs = []
    for unit_cut in cuts:
        unit = Unit(unit_cut.name, unit_cut.modules, keep_unsharded=unit_cut.always_open)
        parts.units.append(unit)
        sharded = parts.policy.shards_parameters and shards and unit_cut.name != "small"
        for trained in (True, False):
            for dtype, members in _by_dtype(unit_cut, group_of, frozen, dtypes, trained).items():
                if trained or sharded:
                    specs.append(_Spec(unit, members, dtype, trained, sharded))
                else:
                    parts.frozen += [(name, parameter) for name, parameter, _ in members]
    return specs


def _make_flat(spec: _Spec, parts: _Parts, placement: Placement, states: StatePlacement) -> None:
    """Create a flat parameter group and add it to its unit. states: where its master weights and states live."""
    unit = spec.unit
    name = f"{unit.name}/{str(spec.dtype).removeprefix('torch.')}{'' if spec.trained else '/frozen'}"
    flat = FlatParamGroup(
        name,
        spec.members,
        spec.dtype,
        parts.policy,
        spec.sharded,
        parts.comm,
        parts.ledger,
        parts.values,
        states,
        spec.trained,
        placement.shards_on_host,
        placement.transfers,
    )
    if spec.trained:
        flat.gradients = Gradients(
            flat.layout,
            parts.policy,
            spec.dtype,
            parts.gradients,
            parts.pool,
            states,
            unit.keep_unsharded,
            placement.grad_offload if states.remote else None,
            name,
        )
    (unit.flats if spec.trained else unit.frozen).append(flat)


def _values(module: nn.Module, comm: Comm) -> Values:
    """The values of the parameters to be. Raises ConfigError on every rank if any rank lacks some. Collective."""
    values, problem = None, ""
    try:
        values = Values.of(module, comm.rank)
    except ConfigError as error:
        problem = str(error)
    problems = [found for found in comm.gather_objects(problem) if found]
    if problems or values is None:
        raise ConfigError(problems[0])
    return values


def _gradient_config(config: Resolved, world_size: int) -> GradientConfig:
    communicate = config.communication_data_type
    return GradientConfig(
        DTYPES[config.grad_accum_dtype],
        DTYPES[communicate] if communicate else None,
        1 / world_size if config.prescale_gradients else 1 / config.gradient_predivide_factor,
    )


def _freeze(module: nn.Module, group_of: dict[nn.Parameter, int], comm: Comm) -> set[nn.Parameter]:
    """Set requires_grad=False on all parameters that are not trained, and return them."""
    frozen = {p for p in module.parameters() if p not in group_of or not p.requires_grad}
    left_out = sum(parameter.requires_grad for parameter in frozen)
    if left_out and group_of and comm.rank == 0:
        log.warning(f"{left_out} parameters require a gradient but are in no optimizer group: they are frozen")
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
    """A unit's trained (or frozen) parameters by compute dtype, sorted by optimizer group."""
    members: dict[torch.dtype, list[Member]] = {}
    for name, parameter in unit.parameters:
        if (parameter not in frozen) == trained:
            members.setdefault(dtypes[parameter], []).append((name, parameter, group_of.get(parameter, 0)))
    return {dtype: sorted(found, key=lambda member: member[2]) for dtype, found in members.items()}


def _dtypes(module: nn.Module, precision: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """The compute dtype of each parameter. With bf16 or fp16 that is the precision, as in DeepSpeed, except that norms
    with running statistics keep weight and bias in the dtype of those, as under autocast. With fp32, parameters keep
    their dtypes."""
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
    """Move an unsharded frozen parameter to the device, with rank 0's values."""
    found = values.read(name, parameter, 0, parameter.numel())
    # New memory: loading a checkpoint must not change tensors that the script holds.
    data = torch.empty(parameter.shape, dtype=dtype, device=comm.device)
    if found is not None:
        data.view(-1).copy_(found)
    if values.needs_broadcast(parameter):
        comm.broadcast_bytes(data)
    set_data(parameter, ledger.hold("parameters", data))


def _place_buffers(module: nn.Module, dtype: torch.dtype | None, comm: Comm, ledger: Ledger, values: Values) -> None:
    """Move buffers to the device, with rank 0's values; floating-point ones become `dtype` (None: keep theirs). Buffers
    that several modules share remain shared."""
    placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old buffer, so that its id is not reused
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
            setattr(owner, name, placed[id(buffer)][1])
