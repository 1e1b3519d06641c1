"""`initialize` and `add_config_arguments`, with DeepSpeed's names and argument order."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from runtime.checkpoint.content.registered import DATA
from runtime.comm import Comm, init_distributed
from runtime.config import ConfigError, Resolved, load, refuse_unsupported
from runtime.diagnose.outofmemory import workload_of_engine
from runtime.diagnose.planned import planned_memory
from runtime.engine.deepspeed_config import DeepSpeedConfig
from runtime.engine.engine import Engine
from runtime.engine.loaders import check_data, training_loader
from runtime.engine.model_checks import check_complete
from runtime.engine.session import Session
from runtime.host.ledger import host_ledger_bytes, memory_message, phase_peaks
from runtime.host.rss_parts import account
from runtime.optim.lr import schedule_from_config
from runtime.optim.optimizer import NoOptimizer, ZeroOptimizer, optimizer_from_config, optimizer_from_torch
from runtime.wire.messages import PlannedMemory
from runtime.wire.rundir import RUN_VARIABLE
from runtime.wire.startnote import tell_start

log = logging.getLogger("runtime.engine")

ModelParameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def initialize(
    args: argparse.Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: ModelParameters | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: str | Path | Mapping[str, Any] | DeepSpeedConfig | Resolved | None = None,
    mesh_param: Sequence[int] | None = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Engine, ZeroOptimizer | None, DataLoader[Any] | None, Any]:
    """Create an engine for `model`; returns (engine, optimizer, training data loader or None, LR scheduler or None).
    Collective.

    model_parameters: parameters or parameter groups for the config's optimizer; default: all that require a gradient.
    optimizer: a new torch.optim optimizer (or a function of the parameters that returns one) instead of the config's.
    With neither, the engine only evaluates: it has no master weights, gradients or optimizer states, shards parameters
    at stage 3, and refuses backward() and step(); optimizer and scheduler are then None.
    training_data: a map-style data set; the loader shuffles it like torch's DistributedSampler, differently each epoch,
    and after a resume continues after the last trained batch (see runtime/data/loader.py).
    lr_scheduler: a scheduler, or a function of the optimizer that returns one, instead of the config's; the engine
    steps it after each optimizer step. config: a DeepSpeed-style file (JSON or Hjson) or dictionary, base64 text, or a
    DeepSpeedConfig; under `zerotop launch` it defaults to the launched one. config_params: an old name of `config`.
    distributed_port, dist_init_required: ignored; the process group is initialized unless the script has done so. mpu,
    mesh_param: refused if they split the model.

    Under `zerotop launch` the first engine of a process publishes telemetry and applies commands; later ones only have
    automatic checkpoints of their own (checkpoints/engine-2/...). Under --resume every engine has loaded its newest
    checkpoint on return.
    Raises ConfigError on every rank, before any training, for an invalid config, model or optimizer.
    """
    if model is None:
        raise ConfigError("initialize(model=...): expected a torch.nn.Module, got None")
    _refuse_model_parallelism(mpu, mesh_param)
    check_complete(model)
    if training_data is not None:
        check_data(training_data, "initialize(training_data=...)")
    account().note_baseline(_host_bytes(model))
    device = init_distributed()
    account().note_prepared()
    chosen = (
        config
        if config is not None
        else config_params
        if config_params is not None
        else getattr(args, "deepspeed_config", None)
    )
    resolved = _resolve(chosen, device)
    refuse_unsupported(resolved)
    if resolved.log_level is not None:
        logging.getLogger("runtime.script").setLevel(resolved.log_level.upper())
    if optimizer is None and resolved.optimizer is None:
        engine = _evaluation_engine(model, resolved, device, model_parameters, lr_scheduler)
        return engine, None, _make_loader(engine, training_data, collate_fn), None
    tell_start("building the engine")
    session = Session.join(torch.distributed.get_rank(), resolved.zerotop.telemetry.enabled)
    comm = Comm(device, session.recorder)
    parameters = (
        list(model_parameters) if model_parameters is not None else [p for p in model.parameters() if p.requires_grad]
    )
    zero_optimizer = _make_optimizer(resolved, optimizer, parameters)
    engine = Engine(model, resolved, zero_optimizer, comm, session)
    engine.lr_scheduler = _make_scheduler(resolved, lr_scheduler, zero_optimizer)
    resumed = engine.resume()
    _announce(engine, resumed)
    return engine, zero_optimizer, _make_loader(engine, training_data, collate_fn), engine.lr_scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed and --deepspeed_config, as DeepSpeed does.

    args.local_rank comes from LOCAL_RANK, even if the script declares a --local_rank of its own, which DeepSpeed's
    launcher would pass.
    """
    group = parser.add_argument_group("ZeRO", "configuration of the training engine")
    group.add_argument(
        "--deepspeed", action="store_true", help="accepted for scripts written for DeepSpeed; initialize() decides"
    )
    group.add_argument("--deepspeed_config", default=None, metavar="FILE", help="the JSON config file")
    parser.set_defaults(local_rank=int(os.environ.get("LOCAL_RANK", "-1")))
    return parser


def _refuse_model_parallelism(mpu: Any, mesh_param: Sequence[int] | None) -> None:
    parts = int(mpu.get_model_parallel_world_size()) if hasattr(mpu, "get_model_parallel_world_size") else 1
    if parts > 1:
        raise ConfigError(
            f"initialize(mpu=...): expected a model-parallel world size of 1, got {parts}; zerotop has "
            "data parallelism only"
        )
    if mesh_param is not None and any(size != 1 for size in list(mesh_param)[1:]):
        raise ConfigError(
            f"initialize(mesh_param={tuple(mesh_param)}): expected (ranks, 1); zerotop has no sequence parallelism"
        )


def _resolve(config: Any, device: torch.device) -> Resolved:
    if isinstance(config, Resolved):
        return config
    if isinstance(config, DeepSpeedConfig):
        if config._param_dict is None:
            return config.resolved
        config = config._param_dict
    world_size = torch.distributed.get_world_size()
    if config is None:
        folder = os.environ.get(RUN_VARIABLE)
        if not folder:
            raise ConfigError(
                "initialize(config=...): expected a path or a dictionary, got None (it may only be left out "
                "under `zerotop launch`)"
            )
        return Resolved.from_json((Path(folder) / "resolved.json").read_bytes())
    return load(config).resolve(world_size, "cuda" if device.type == "cuda" else "cpu", script=True)


def _evaluation_engine(
    model: nn.Module, config: Resolved, device: torch.device, model_parameters: Any, lr_scheduler: Any
) -> Engine:
    """An engine for a model that is not trained: a reference or reward model, a teacher."""
    for name, given in (("model_parameters", model_parameters), ("lr_scheduler", lr_scheduler)):
        if given is not None:
            raise ConfigError(
                f'initialize({name}=...) needs an optimizer: add an "optimizer" section to the config or pass '
                f"initialize(optimizer=...). An engine that only evaluates takes no {name}"
            )
    session = Session.unattached(torch.distributed.get_rank())
    config = config.model_copy(update={"offload_optimizer": None, "scheduler": None})
    engine = Engine(model, config, NoOptimizer(), Comm(device, session.recorder), session)
    if session.rank == 0:
        log.info(f"engine without an optimizer for {type(model).__name__} at stage {config.stage}: evaluation only")
    return engine


def _make_optimizer(config: Resolved, given: Any, parameters: list[Any]) -> ZeroOptimizer:
    if given is None:
        assert config.optimizer is not None
        return optimizer_from_config(parameters, config.optimizer)
    if not isinstance(given, torch.optim.Optimizer):
        if not callable(given):
            raise ConfigError(
                f"initialize(optimizer=...): expected a torch optimizer or a function that returns one, got "
                f"{type(given).__name__}"
            )
        given = given(parameters)
    return optimizer_from_torch(given)


def _make_scheduler(config: Resolved, given: Any, optimizer: ZeroOptimizer) -> Any:
    if given is not None:
        scheduler = given(optimizer) if callable(given) and not hasattr(given, "step") else given
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "lr_scheduler: ReduceLROnPlateau needs a metric at each step, which engine.step() "
                "does not have; leave it out of initialize() and step it yourself"
            )
        bound = getattr(scheduler, "optimizer", None)
        if bound is not None and bound is not optimizer and bound is not optimizer.wrapped:
            raise ConfigError(
                "lr_scheduler: it belongs to another optimizer than the one passed to initialize(); build it on "
                "that one, or pass a function of the optimizer"
            )
        return scheduler
    if config.scheduler is None:
        return None
    try:
        return schedule_from_config(optimizer, config.scheduler)
    except ValueError as error:
        raise ConfigError(f"scheduler.params.{error}") from None


def _host_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters in host memory."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.is_cpu}
    return sum(storages.values())


def _make_loader(engine: Engine, data: Any, collate_fn: Any) -> DataLoader[Any] | None:
    if data is None:
        return None
    accumulation = engine.state.accumulation
    loader = training_loader(data, collate_fn, engine.config, engine.comm, lambda: accumulation.micro_steps)
    engine.script.registered.add(DATA, loader)
    engine.training_dataloader = loader
    return loader


def _planned(engine: Engine) -> PlannedMemory | None:
    """The plan's figures for this engine, for the monitor."""
    workload, session = workload_of_engine(engine.module), engine.session
    if workload is None or session.run is None:
        return None
    built_in = session.run.script is None and engine.config.zerotop.model.path is None
    return planned_memory(workload, engine.config, builds_whole=built_in)


def _announce(engine: Engine, resumed: Path | None) -> None:
    """Start the session: send its hello to the hub, and log what is being trained."""
    session, link = engine.session, engine.session.link
    # The session outlives the engine, so the callback must not reference it.
    rank, ledger, device = engine.comm.rank, engine.state.ledger, engine.device
    if session.number == 1:  # only its memory is reported
        account().note_built(host_ledger_bytes(ledger, device))
    peaks = phase_peaks(device, ledger)
    session.recorder.phase_ended = peaks.phase_ended
    link.memory_source = lambda: memory_message(rank, ledger, device, peaks)
    hello = session.hello(engine.config, engine.comm, engine.module, engine.global_steps, dict(engine.control.knobs))
    session.begin(hello.model_copy(update={"planned": _planned(engine)}))
    if session.number == 1:
        engine.control.apply_log_level()
    if engine.comm.rank == 0:
        units = len(engine.state.flats)
        log.info(
            f"stage {engine.config.stage}, {engine.config.precision}, {engine.comm.world_size} ranks over "
            f"{engine.comm.backend}: "
            f"{sum(p.numel() for p in engine.module.parameters()):,} parameters in {units} unit{'s' * (units != 1)}"
        )
        if resumed is not None:
            link.event(
                "resumed", f"continuing from {resumed.name}", step=engine.global_steps, data={"path": str(resumed)}
            )
        elif session.resume and engine.autosave.folder is not None:
            log.warning(f"--resume: no complete checkpoint in {engine.autosave.folder}; starting from step 0")
