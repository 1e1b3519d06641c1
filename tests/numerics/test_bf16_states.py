"""Optimizer states in bf16: half the memory, the training curve of fp32 states, the same bits at every stage and
wherever they live, and checkpoints that either kind of states reads."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.config import ConfigError, load, refuse_unsupported
from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.remote import remote_device
from tests.numerics.test_losses import BF16_HYPER, gpt, tokens
from tests.numerics.training import advance, config, engine_for, parameters

STEPS = 6


def settings(stage: int, dtype: str = "bf16", precision: str = "bf16", offload: bool = False, **more: Any) -> Any:
    found = config(stage, 1, clip=0.5, precision=precision, zerotop={"optimizer_state_dtype": dtype}, **more)
    if offload:
        place = {"device": "cpu", "pin_memory": True, "ratio": 0.6}  # some states stay
        found["zero_optimization"] = {**found["zero_optimization"], "offload_optimizer": place}
    return found


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's moments by name of the parameter and first element."""
    found = {}
    for optimizer in engine.state.shard_optimizers:
        flat = optimizer.flat
        for part in flat.layout.slices(flat.start, flat.end):
            for state in optimizer.states():
                held = state.tensor[part.shard_start : part.shard_start + part.numel]
                found[f"{state.name} {part.name} {part.param_start}"] = held.clone()
    return found


def train(config: Any, remote: bool = False) -> Any:
    """Parameters and full moments of all ranks, and the ledger."""
    if remote:
        with remote_device("late"):
            return _trained(config)
    return _trained(config)


def _trained(config: Any) -> Any:
    engine = engine_for(config)
    advance(engine, 0, STEPS)
    engine.synchronize()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, states_of(engine))
    whole: dict[str, torch.Tensor] = {}
    for name in sorted({name.rsplit(" ", 1)[0] for one in gathered for name in one}):
        parts = {int(key.rsplit(" ", 1)[1]): value for one in gathered for key, value in one.items()
                 if key.rsplit(" ", 1)[0] == name}  # fmt: skip
        whole[name] = torch.cat([value for _, value in sorted(parts.items())])
    ledger = engine.state.ledger
    return parameters(engine), whole, ledger.totals()["optimizer"] + ledger.offloaded()["optimizer"]


@pytest.mark.parametrize(
    ("precision", "stage", "offload", "remote"),
    [
        *(("bf16", stage, False, False) for stage in (0, 1, 3)),
        ("bf16", 0, True, True),
        ("bf16", 2, True, False),
        ("fp32", 3, False, False),
        ("fp32", 2, True, True),
    ],
)
def test_the_same_bits_at_every_stage_and_with_offload(ranks, reference, precision, stage, offload, remote):
    values, states, _ = reference(2, train, settings(2, precision=precision))[0]
    ours, our_states, _ = ranks(2).run(train, settings(stage, precision=precision, offload=offload), remote)[0]
    assert all(torch.equal(ours[name], value) for name, value in values.items())
    assert our_states.keys() == states.keys()
    for name, value in states.items():
        assert value.dtype == our_states[name].dtype == torch.bfloat16
        assert torch.equal(our_states[name][: value.numel()], value), name


@pytest.mark.parametrize("offload", [False, True])
def test_half_the_memory(ranks, offload):
    wide, narrow = (ranks(2).run(train, settings(2, dtype, offload=offload)) for dtype in ("fp32", "bf16"))
    for (_, _, wide_bytes), (_, _, narrow_bytes) in zip(wide, narrow, strict=True):
        assert wide_bytes == 2 * narrow_bytes > 0


# ---- training curve --------------------------------------------------------------------------------------------------
CURVE_STEPS = 40


def curve(dtype: str) -> list[float]:
    given = settings(2, dtype, precision="fp32")
    given["optimizer"]["params"] = {**BF16_HYPER, "betas": [0.9, 0.999]}
    engine = initialize(model=gpt(), config=given)[0]
    rank, losses = dist.get_rank(), []
    for step in range(CURVE_STEPS):
        mine = tokens(step, 2).chunk(2)[rank]
        loss = engine(mine[:, :-1], mine[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_the_training_curve_is_that_of_fp32_states(ranks):
    wide, narrow = (ranks(2).run(curve, dtype)[0] for dtype in ("fp32", "bf16"))
    assert wide[-1] < wide[0] - 1.5
    assert max(abs(a - b) for a, b in zip(wide, narrow, strict=True)) < 0.05
    assert abs(sum(wide[-10:]) - sum(narrow[-10:])) / 10 < 0.01


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def save(folder: str, config: Any) -> Any:
    engine = engine_for(config)
    advance(engine, 0, STEPS)
    engine.save_checkpoint(folder)
    states = states_of(engine)
    advance(engine, STEPS, 2 * STEPS)
    return states, parameters(engine)


def resume(folder: str, config: Any) -> Any:
    """States as loaded, parameters after further steps, and the warnings."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("runtime").addHandler(handler)
    try:
        engine = engine_for(config)
        engine.load_checkpoint(folder)
    finally:
        logging.getLogger("runtime").removeHandler(handler)
    states = states_of(engine)
    advance(engine, STEPS, 2 * STEPS)
    return states, parameters(engine), [text for text in warnings if "rounded" in text]


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_continues_bit_for_bit(ranks, tmp_path, offload):
    saved = ranks(2).run(save, str(tmp_path), settings(2, offload=offload))
    resumed = ranks(2).run(resume, str(tmp_path), settings(2, offload=offload))
    for (states, unbroken), (loaded, ours, warnings) in zip(saved, resumed, strict=True):
        assert all(torch.equal(loaded[name], value) for name, value in states.items()) and not warnings
        assert all(torch.equal(ours[name], value) for name, value in unbroken.items())


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_states_of_the_other_kind_are_read(ranks, tmp_path, before, after):
    saved = ranks(2).run(save, str(tmp_path), settings(2, before))
    resumed = ranks(2).run(resume, str(tmp_path), settings(1, after))
    for rank, ((states, _), (loaded, _, warnings)) in enumerate(zip(saved, resumed, strict=True)):
        for name, value in states.items():
            assert loaded[name].dtype == (torch.bfloat16 if after == "bf16" else torch.float32)
            assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name
        assert len(warnings) == (1 if after == "bf16" and rank == 0 else 0)
        assert not warnings or "optimizer states in fp32: they are rounded to bf16" in warnings[0]


# ---- what does not go together ---------------------------------------------------------------------------------------
def test_other_optimizers_and_updates_on_the_gpu_are_refused():
    refuse_unsupported(load(settings(2)).resolve(1, "cpu"))
    with pytest.raises(ConfigError, match='"bf16" needs the optimizer AdamW or Adam, got SGD; use "fp32"'):
        refuse_unsupported(load(settings(2, optimizer="SGD")).resolve(1, "cpu"))
    on_gpu = settings(2, offload=True)
    on_gpu["zerotop"]["offload"] = {"update": "gpu"}
    with pytest.raises(ConfigError, match=r'set zerotop\.offload\.update to "cpu" or "auto"'):
        refuse_unsupported(load(on_gpu).resolve(1, "cuda"))


def a_scripts_own_optimizer() -> None:
    model = make("plain")
    given = {key: value for key, value in settings(1).items() if key != "optimizer"}
    with pytest.raises(ConfigError, match='"bf16" needs the optimizer AdamW or Adam, got SGD'):
        initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=given)


def test_a_scripts_own_optimizer_is_refused(ranks):
    ranks(1).run(a_scripts_own_optimizer)
