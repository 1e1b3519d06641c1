"""The engine as DeepSpeed's users know it: a module, attributes of parameters, fp32 parts, an engine that evaluates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from runtime.checkpoint import CheckpointError
from runtime.config import ConfigError
from tests.numerics.models import make
from tests.numerics.training import (
    HYPER,
    advance,
    assert_equal,
    config,
    engine_for,
    message_of,
    micro_batch,
    parameters,
)


# ---- a module --------------------------------------------------------------------------------------------------------
def use_as_a_module(stage: int) -> dict[str, Any]:
    import torch.distributed as dist

    import runtime as deepspeed

    engine = engine_for(config(stage, 1, clip=0.0))
    seen: list[str] = []
    before = engine.register_forward_pre_hook(lambda *_given: seen.append("before"))
    engine.register_forward_hook(lambda *_given: seen.append("after"))
    engine(*micro_batch(0, 0, dist.get_rank(), dist.get_world_size()))
    before.remove()
    engine.eval()
    state = engine.state_dict(prefix="x.")
    plain = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.load_state_dict({name: value + 1 for name, value in engine.state_dict().items()})
    return {
        "kinds": (isinstance(engine, nn.Module), isinstance(engine, deepspeed.DeepSpeedEngine)),
        "hooks": seen,
        "modules": [name for name, _ in engine.named_modules()][:3],
        "same names": [n for n, _ in engine.named_parameters(prefix="x")]
        == [f"x.{n}" for n, _ in engine.module.named_parameters()],
        "state": sorted(state) == sorted(f"x.{name}" for name in plain),
        "loaded": all(torch.equal(engine.module.state_dict()[name], value + 1) for name, value in plain.items()),
        "modes": (engine.training, engine.module.training, engine.train().training, engine.module.training),
        "attribute of the model": engine.blocks is engine.module.blocks,
    }


@pytest.mark.parametrize("stage", [1, 3])
def test_the_engine_is_a_module_around_the_model(ranks, stage):
    for found in ranks(2).run(use_as_a_module, stage):
        assert found["kinds"] == (True, True)
        assert found["hooks"] == ["before", "after"]
        assert found["modules"] == ["", "module", "module.embedding"]
        assert found["modes"] == (False, False, True, True)
        assert found["same names"] and found["state"] and found["loaded"] and found["attribute of the model"]


# ---- parts of parameters ---------------------------------------------------------------------------------------------
def read_and_write_parts(stage: int, precision: str) -> dict[str, Any]:
    import torch.distributed as dist

    from runtime.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    rank, world = dist.get_rank(), dist.get_world_size()
    engine = engine_for(config(stage, 2, clip=0.0, precision=precision))
    named = dict(engine.module.named_parameters())
    before = {name: safe_get_full_fp32_param(p) for name, p in named.items()}
    found: dict[str, Any] = {"before": before, "none yet": safe_get_full_grad(named["head.weight"])}
    for micro in range(2):
        engine.backward(engine(*micro_batch(0, micro, rank, world)))
        found[f"gradients {micro}"] = {name: safe_get_full_grad(p) for name, p in named.items()}
        if micro == 0:
            engine.step()
    nothing = torch.zeros_like(before["head.weight"])
    safe_set_full_grad(named["head.weight"], nothing)
    found["set gradient"] = torch.equal(safe_get_full_grad(named["head.weight"]), nothing)
    engine.step()
    found["averages"] = {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in named.items()}
    wanted = before["blocks.1.up.weight"] + 1.0
    safe_set_full_fp32_param(named["blocks.1.up.weight"], wanted)
    safe_set_full_optimizer_state(named["blocks.1.up.weight"], nothing.new_full(wanted.shape, 0.5), "exp_avg")
    shown = engine.module.state_dict()["blocks.1.up.weight"]
    found["set parameter"] = torch.equal(safe_get_full_fp32_param(named["blocks.1.up.weight"]), wanted)
    found["shown"] = torch.equal(shown.to(torch.float32), wanted.to(shown.dtype).to(torch.float32))
    found["set state"] = safe_get_full_optimizer_state(named["blocks.1.up.weight"], "exp_avg").unique().tolist()
    found["unknown state"] = message_of(
        ValueError, lambda: safe_get_full_optimizer_state(named["head.weight"], "momentum")
    )
    found["of no engine"] = safe_get_full_fp32_param(nn.Parameter(torch.ones(2)))
    return found


def plain_gradients(micros: int) -> dict[str, torch.Tensor]:
    """The mean over the ranks of the first micro-steps, divided by the two of the accumulation."""
    model = make("plain")
    for micro in range(micros):
        for rank in range(2):
            (model(*micro_batch(0, micro, rank, 2)) / 4).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_fp32_parts_of_parameters_at_every_stage(ranks, stage, precision):
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    initial = dict(make("plain").named_parameters())
    first, second = plain_gradients(1), plain_gradients(2)
    for found in ranks(2).run(read_and_write_parts, stage, precision):
        assert found["none yet"] is None and found["of no engine"] is None
        for name, value in initial.items():
            torch.testing.assert_close(found["before"][name], value.detach(), rtol=0, atol=0)
            torch.testing.assert_close(found["gradients 0"][name], first[name], rtol=0, atol=tolerance)
            torch.testing.assert_close(found["gradients 1"][name], second[name], rtol=0, atol=tolerance)
            used = torch.zeros_like(second[name]) if name == "head.weight" else second[name]
            torch.testing.assert_close(found["averages"][name], used * (1 - HYPER["betas"][0]), rtol=0, atol=tolerance)
        assert found["set gradient"] and found["set parameter"] and found["shown"]
        assert found["set state"] == [0.5]
        assert found["unknown state"].endswith("expected one of exp_avg, exp_avg_sq")


def attributes_at_stage_3() -> dict[str, Any]:
    import copy

    import runtime as deepspeed
    from runtime.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
    from runtime.zero.partition_parameters import ZeroParamStatus

    settings = config(3, 1, clip=0.0)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 20
    engine = engine_for(settings, "frozen")
    named = dict(engine.module.named_parameters())
    weight, small = named["blocks.0.up.weight"], named["blocks.0.norm.weight"]
    found: dict[str, Any] = {
        "ids": [p.ds_id for p in named.values()],
        "numbers": (weight.ds_numel, tuple(weight.ds_shape), weight.ds_persist, small.ds_persist),
        "status": (weight.ds_status, small.ds_status, named["blocks.1.up.weight"].ds_status),
        "local": [p.ds_tensor.numel() for p in named.values() if not p.ds_persist],
        "whole": [p.ds_numel for p in named.values() if not p.ds_persist],
    }
    weight.all_gather()
    found["copies"] = (hasattr(copy.deepcopy(weight), "ds_id"), hasattr(nn.Parameter(weight), "ds_id"))
    found["gathered"] = weight.ds_status is ZeroParamStatus.AVAILABLE and not weight.isnan().any().item()
    with torch.no_grad():
        weight.fill_(3.0)
    weight.partition(has_been_updated=True)
    found["parted"] = weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    with deepspeed.zero.GatheredParameters([weight, None]):
        found["kept"] = weight.unique().tolist()
    local = safe_get_local_fp32_param(weight)
    safe_set_local_fp32_param(weight, torch.full_like(local, 4.0))
    with deepspeed.zero.GatheredParameters(weight):
        found["set"] = weight.unique().tolist()
    engine.destroy()
    found["after destroy"] = (
        nn.Parameter(weight).shape == weight.shape,
        hasattr(weight, "ds_id"),
        weight.unique().tolist(),
    )
    return found


def test_parameters_at_stage_3_have_deepspeeds_attributes(ranks):
    from runtime.zero.partition_parameters import ZeroParamStatus as Status

    first, second = ranks(2).run(attributes_at_stage_3)
    assert first["ids"] == second["ids"] and len(set(first["ids"])) == len(first["ids"])
    for at, numel in enumerate(first["whole"]):
        assert first["local"][at] + second["local"][at] == numel
    for found in (first, second):
        assert found["numbers"] == (29 * 13, (29, 13), False, True)
        assert found["status"] == (Status.NOT_AVAILABLE, Status.AVAILABLE, Status.NOT_AVAILABLE)
        assert found["copies"] == (False, False)
        assert found["gathered"] and found["parted"]
        assert found["kept"] == [3.0] and found["set"] == [4.0]
        assert found["after destroy"] == (True, False, [4.0])


# ---- leaf modules ----------------------------------------------------------------------------------------------------
class ByRank(nn.Module):
    """Which of its layers runs differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        return self.layers[dist.get_rank() % 2](x).square().mean()


def train_by_rank(stage: int) -> dict[str, torch.Tensor]:
    from runtime.engine.initialize import initialize
    from runtime.utils import set_z3_leaf_modules

    torch.manual_seed(0)
    model = ByRank()
    set_z3_leaf_modules(model, [ByRank])
    settings = config(stage, 1, clip=0.0)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = initialize(model=model, config=settings)[0]
    for step in range(3):
        engine.backward(engine(torch.full((2, 8), 1.0 + step)))
        engine.step()
    return parameters(engine)


def test_ranks_may_differ_below_a_leaf_module(ranks):
    plain, sharded = ranks(2).run(train_by_rank, 0), ranks(2).run(train_by_rank, 3)
    for one, other in zip(plain, sharded, strict=True):
        assert_equal(other, one)


# ---- without an optimizer --------------------------------------------------------------------------------------------
def evaluate(stage: int, folder: str) -> dict[str, Any]:
    import torch.distributed as dist

    trained = engine_for(config(2, 1, clip=0.0))
    advance(trained, 0, 2)
    trained.save_checkpoint(folder)
    settings = config(stage, 1, clip=0.0)
    del settings["optimizer"]
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    from runtime.engine.initialize import initialize

    model = make("frozen")
    flags = [p.requires_grad for p in model.parameters()]
    engine, optimizer, _, scheduler = initialize(model=model, config=settings)
    batch = micro_batch(0, 0, dist.get_rank(), dist.get_world_size())
    found: dict[str, Any] = {
        "loss": engine(*batch).item(),
        "results": (optimizer, scheduler, engine.get_lr()),
        "held": {name: held for name, held in engine.state.ledger.totals().items() if held},
        "step": message_of(RuntimeError, engine.step),
        "backward": message_of(RuntimeError, lambda: engine.backward(torch.ones((), requires_grad=True))),
        "exclude": message_of(CheckpointError, lambda: engine.save_checkpoint(folder, exclude_frozen_parameters=True)),
        "requires grad": any(p.requires_grad for p in model.parameters()),
        "session": engine.session.number,
    }
    engine.load_checkpoint(folder)
    found["loaded"] = parameters(engine)
    found["trained"] = parameters(trained)
    engine.destroy()
    found["flags"] = [p.requires_grad for p in model.parameters()] == flags
    found["forgotten"] = message_of(
        ConfigError,
        lambda: initialize(model=make("plain"), model_parameters=make("plain").parameters(), config=settings),
    )
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_an_optimizer_evaluates(ranks, stage, tmp_path):
    for rank, found in enumerate(ranks(2).run(evaluate, stage, str(tmp_path))):
        model = make("frozen")
        assert found["loss"] == pytest.approx(model(*micro_batch(0, 0, rank, 2)).item(), abs=1e-6)
        assert found["results"] == (None, None, [])
        numel = sum(p.numel() for p in model.parameters())
        held = found["held"]
        assert held.keys() <= {"parameters", "communication", "buffers"}  # no masters, gradients or states
        assert held["parameters"] <= (4 * numel if stage == 0 else 2 * numel + 4 * 64 * 8)
        for call in ("step", "backward"):
            assert "made without an optimizer" in found[call] and 'add an "optimizer" section' in found[call]
        assert "none would be saved" in found["exclude"]
        assert not found["requires grad"] and found["flags"]
        assert found["session"] == 0  # the run watches and steers the engine that trains
        assert "model_parameters" in found["forgotten"] and 'add an "optimizer" section' in found["forgotten"]
        for name, value in found["trained"].items():
            assert torch.equal(found["loaded"][name], value), name


def save_without_an_optimizer(stage: int, precision: str, folder: str) -> dict[str, Any]:
    from runtime.engine.initialize import initialize
    from runtime.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    settings = config(stage, 1, clip=0.0, precision=precision)
    del settings["optimizer"]
    made = {name: initialize(model=make("frozen"), config=settings)[0] for name in ("saved", "loaded")}
    trained = engine_for(config(2, 1, clip=0.0), "frozen")
    advance(trained, 0, 1)
    with torch.no_grad():
        made["saved"].module.load_state_dict(trained.module.state_dict())
    made["saved"].save_checkpoint(folder, client_state={"epoch": 3}, wait=stage != 3)
    made["saved"].wait_for_checkpoint()
    states = {name: tensors["exp_avg"].clone() for name, tensors in trained.optimizer.state_dict()["state"].items()}
    advance(trained, 1, 2)
    found: dict[str, Any] = {"client": [one.load_checkpoint(folder)[1] for one in (made["loaded"], trained)]}
    after = trained.optimizer.state_dict()["state"]
    changed = [not torch.equal(tensors["exp_avg"], states[name]) for name, tensors in after.items()]
    found["goes on"] = (trained.global_steps, any(changed))
    advance(trained, 2, 3)
    saved = {name: value.float() for name, value in parameters(made["saved"]).items()}
    found["same"] = all(torch.equal(value.float(), saved[n]) for n, value in parameters(made["loaded"]).items())
    fp32 = get_fp32_state_dict_from_zero_checkpoint(folder)
    found["read"] = all(torch.equal(fp32[name], value) for name, value in saved.items())
    return found


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "bf16")])
def test_an_engine_without_an_optimizer_saves_its_weights(ranks, stage, precision, tmp_path):
    for found in ranks(2).run(save_without_an_optimizer, stage, precision, str(tmp_path)):
        assert found["client"] == [{"epoch": 3}] * 2
        assert found["goes on"] == (2, True)  # neither steps nor states are the checkpoint's
        assert found["same"] and found["read"]


# ---- calls ----------------------------------------------------------------------------------------------------------
def call(stage: int, folder: str) -> dict[str, Any]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    engine = engine_for(config(stage, 2, clip=0.0, precision="bf16"))
    found: dict[str, Any] = {"applied": []}
    for micro in range(2):
        engine.backward(engine(*micro_batch(0, micro, rank, world)))
        engine.step()
        found["applied"].append(engine.was_step_applied())
    before = {name: value.clone() for name, value in parameters(engine).items()}
    engine.offload_states(include=["optim_states"])
    engine.eval()(*micro_batch(0, 0, rank, world))  # needs the parameters alone
    engine.train()
    found["ledger"] = (engine.state.ledger.totals()["optimizer"], engine.state.ledger.offloaded()["optimizer"] > 0)
    loss = engine(*micro_batch(0, 0, rank, world))
    found["parked"] = message_of(RuntimeError, lambda: engine.backward(loss))
    engine.reload_states()
    found["same"] = all(torch.equal(value, before[name]) for name, value in parameters(engine).items())
    found["unknown"] = message_of(ConfigError, lambda: engine.offload_states(include=["weights"]))
    engine.set_train_batch_size(2 * world)
    engine.set_lr(0.25)
    advance(engine, 1, 3)
    kept = engine._config
    found["config"] = [kept.train_batch_size, kept.bfloat16_enabled, kept.optimizer_name]
    found["zero"] = (kept.zero_config.stage, kept.zero_config.param_persistence_threshold)
    found["batch"] = (engine.get_batch_info(), engine.global_steps, engine.get_lr(), engine.optimizer.loss_scale)
    found["scaled"] = engine.optimizer.needs_scaler()
    timer = engine.tput_timer
    found["timer"] = (timer.global_step_count, timer.micro_step_count, timer.batch_size)
    timer.update_epoch_count()
    engine.monitor.write_events([("valid/loss", loss, engine.global_steps)])
    found["no multiple"] = message_of(ValueError, lambda: engine.set_train_batch_size(3))

    def nest() -> None:
        with engine.no_sync(), engine.no_sync():
            pass

    found["nested"] = message_of(RuntimeError, nest)
    with engine.no_sync():
        found["after it"] = not engine.state.accumulation.syncs
    state = engine._zero3_consolidated_16bit_state_dict()
    found["state"] = None if state is None else {str(value.dtype) for value in state.values()}
    found["frozen left out"] = sorted(set(before) - set(engine.module_state_dict(exclude_frozen_parameters=True)))
    engine.load_module_state_dict({"module": {name: torch.zeros_like(value) for name, value in before.items()}})
    found["zeroed"] = all(not value.any() for value in parameters(engine).values())
    engine.save_fp16_model(folder)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_calls_of_the_engine(ranks, stage, tmp_path):
    first, second = ranks(2).run(call, stage, str(tmp_path))
    for found in (first, second):
        assert found["applied"] == [False, True]
        assert found["ledger"] == (0, True) and found["same"] and found["zeroed"] and found["after it"]
        assert found["parked"].endswith("; call engine.reload_states() on every rank first")
        assert "expected some of optim_states" in found["unknown"]
        assert found["batch"] == ((4, 2, 1), 3, [0.25], 1.0) and not found["scaled"]
        assert found["config"] == [4, True, "adamw"] and found["zero"] == (stage, 0)
        assert found["timer"] == (3, 4, 4)
        assert "a multiple of 4" in found["no multiple"] and "no_sync() inside" in found["nested"]
        assert found["frozen left out"] == []
    assert first["state"] == {"torch.bfloat16"} and second["state"] is None
    assert (tmp_path / "pytorch_model.bin").is_file()


def load_data() -> dict[str, Any]:
    from torch.utils.data import TensorDataset

    engine = engine_for(config(1, 1, clip=0.0))
    data = TensorDataset(torch.arange(8))
    train = engine.deepspeed_io(data)
    shares = [torch.cat([batch for (batch,) in train]) for _ in range(2)]
    whole = [torch.zeros(8, dtype=torch.int64) for _ in range(2)]
    for share, counts in zip(shares, whole, strict=True):
        counts[share] = 1
        torch.distributed.all_reduce(counts)
    return {
        "shares": [share.tolist() for share in shares],
        "each once": [counts.tolist() for counts in whole],
        "eval": [batch.tolist() for (batch,) in engine.deepspeed_io(data, batch_size=3, route="eval")],
        "own sampler": [batch.tolist() for (batch,) in engine.deepspeed_io(data, data_sampler=[5, 1, 2])],
        "route": message_of(ConfigError, lambda: engine.deepspeed_io(data, route="test")),
        "endless": message_of(ConfigError, lambda: engine.deepspeed_io(iter([1]))),
    }


def test_loaders_that_the_engine_makes(ranks):
    first, second = ranks(2).run(load_data)
    assert first["shares"] != second["shares"] and len(first["shares"][0]) == 4
    for found in (first, second):
        assert found["shares"][0] == found["shares"][1]  # nothing was trained between the two
        assert found["each once"] == [[1] * 8] * 2
        assert found["eval"] == [[0, 1, 2], [3, 4, 5], [6, 7]] and found["own sampler"] == [[5, 1], [2]]
        assert "expected one of train, eval, predict" in found["route"]
        assert "expected a data set with a length" in found["endless"]


# ---- fp32 weights of a checkpoint ------------------------------------------------------------------------------------
def save_trained(folder: str) -> dict[str, torch.Tensor]:
    from runtime.utils import safe_get_full_fp32_param

    engine = engine_for(config(3, 1, clip=0.0, precision="bf16"), "frozen")
    advance(engine, 0, 2)
    engine.save_checkpoint(folder)
    return {
        name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters() if "blocks.1.up" not in name
    }


def save_tied(folder: str) -> None:
    engine = engine_for(config(3, 1, clip=0.0), "tied")
    advance(engine, 0, 1)
    engine.save_checkpoint(folder)


def test_tied_weights_have_all_their_names(ranks, tmp_path):
    from runtime.utils.zero_to_fp32 import (
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
    )

    ranks(2).run(save_tied, str(tmp_path))
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert found["head.weight"] is found["embedding.weight"]
    make("tied").load_state_dict(found, strict=True)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out", safe_serialization=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["head.weight"], found["embedding.weight"])


def test_fp32_weights_of_a_checkpoint(ranks, tmp_path):
    from runtime.utils.zero_to_fp32 import (
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )

    masters = ranks(2).run(save_trained, str(tmp_path / "run"))[0]
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    assert found.keys() == dict(make("frozen").named_parameters()).keys()
    for name, value in masters.items():
        assert torch.equal(found[name], value), name
    trained = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run", exclude_frozen_parameters=True, lazy_mode=True)
    assert found.keys() - trained.keys() == {"blocks.1.up.weight", "blocks.1.up.bias"}
    assert trained["head.weight"].shape == (37, 13) and trained["head.weight"].dtype is torch.float32
    assert torch.equal(
        load_state_dict_from_zero_checkpoint(make("frozen"), tmp_path / "run").head.weight, found["head.weight"]
    )
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "run", tmp_path / "out", max_shard_size="2KB")
    files = sorted((tmp_path / "out").glob("*.bin"))
    written = {name: value for file in files for name, value in torch.load(file, weights_only=True).items()}
    assert len(files) > 1 and (tmp_path / "out" / "pytorch_model.bin.index.json").is_file()
    assert written.keys() == found.keys() and all(torch.equal(written[name], found[name]) for name in found)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
