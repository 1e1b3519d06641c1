"""What `optimizer.state_dict()` gives and `load_state_dict()` takes: this rank's own part, as DeepSpeed's does. A
checkpoint is what another world size or stage can read."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.parts import pieces_of
from runtime.optim.optimizer import plain_numbers

if TYPE_CHECKING:
    from runtime.engine import Engine


def bind_states(engine: Engine) -> None:
    """From now on the engine's optimizer has states to give."""
    weak = weakref.ref(engine)

    def owner() -> Engine:
        if (alive := weak()) is None:
            raise RuntimeError("optimizer.state_dict(): the engine that held the states is gone")
        return alive

    engine.optimizer.save_states = lambda: _state_of(owner())
    engine.optimizer.load_states = lambda state: _load(owner(), state)


def _state_of(engine: Engine) -> dict[str, Any]:
    engine.synchronize()
    return {
        **_place(engine),
        "optimizer_steps": engine.optimizer_steps,
        "scalars": [rule.scalars() for rule in engine.rules],
        "state": {name: piece.tensor.detach().cpu().clone() for name, piece in _trained(engine)},
        "param_groups": [
            {**plain_numbers(group), "params": list(range(len(group["params"])))}
            for group in engine.optimizer.param_groups
        ],
    }


def _place(engine: Engine) -> dict[str, int]:
    return {"rank": engine.comm.rank, "world_size": engine.comm.world_size, "stage": engine.policy.stage}


def _trained(engine: Engine) -> list[tuple[str, Any]]:
    """Masters and states of this rank's shards."""
    frozen = {f"param.{slot.name}" for flat in engine.frozen_flats for slot in flat.layout.slots}
    return [(name, piece) for name, piece in pieces_of(engine).items() if name not in frozen]


def _load(engine: Engine, state: Mapping[str, Any]) -> None:
    """Raises ValueError for what another rank, world size, stage or model has given."""
    engine.synchronize()
    engine.saver.before_change()
    _check(engine, state)
    for rule in engine.rules:
        rule.reset(to_read=state["optimizer_steps"] > 0)
    pieces = dict(_trained(engine))
    for name, tensor in state["state"].items():
        if name not in pieces or pieces[name].tensor.shape != tensor.shape:
            raise ValueError(f"optimizer.load_state_dict(): {name} of {list(tensor.shape)} is of another optimizer")
        pieces[name].tensor.copy_(tensor)
    for rule, scalars in zip(engine.rules, state["scalars"], strict=True):
        rule.load_scalars(scalars)
    for flat in engine.flats:
        flat.masters_to_parameters()
    engine.gathering.stale()
    for pending in [flat.gather_updated() for flat in engine.flats if not flat.sharded]:
        pending.wait()
    for group, saved in zip(engine.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    skipped = engine.skipped_steps
    engine.optimizer_steps = state["optimizer_steps"]
    engine.foreign_steps = engine.global_steps - skipped - engine.optimizer_steps


def _check(engine: Engine, state: Mapping[str, Any]) -> None:
    """Before anything is changed."""
    expected = (*_place(engine), "optimizer_steps", "scalars", "state", "param_groups")
    if missing := next((key for key in expected if key not in state), ""):
        raise ValueError(
            f"optimizer.load_state_dict(): expected what state_dict() of this optimizer gave; no {missing!r}"
        )
    for key, mine in _place(engine).items():
        if state[key] != mine:
            raise ValueError(
                f"optimizer.load_state_dict(): the states are of {key} {state[key]}, this is {key} {mine}: each rank "
                "takes its own; engine.load_checkpoint() reads those of any world size and stage"
            )
    ours = [len(group["params"]) for group in engine.optimizer.param_groups]
    if ours != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError("optimizer.load_state_dict(): the parameter groups are other ones: make them as they were")
    masters = {name: piece.tensor.shape for name, piece in _trained(engine) if name.startswith("param.")}
    if masters != {n: tensor.shape for n, tensor in state["state"].items() if n.startswith("param.")}:
        raise ValueError("optimizer.load_state_dict(): the states are of another model")
