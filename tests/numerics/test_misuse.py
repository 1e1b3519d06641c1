"""What scripts can do to an engine that would go wrong silently, or at a place far from the cause: refused, in words."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.test_checkpoint import advance, engine_for
from tests.numerics.test_parity import config, micro_batch
from tests.numerics.test_scripts import message_of


class Boom(Exception):
    pass


# ---- a backward that fails -------------------------------------------------------------------------------------------
def fail_in_backward(stage: int, folder: str) -> list[str]:
    import torch.distributed as dist

    engine = engine_for(config(stage, 1, clip=0.0))
    advance(engine, 0, 1)
    engine.save_checkpoint(folder)

    def hook(_gradient: torch.Tensor) -> None:
        raise Boom

    output = engine(*micro_batch(1, 0, dist.get_rank(), dist.get_world_size()))
    output.register_hook(hook)
    message_of(Boom, lambda: engine.backward(output))
    return [
        message_of(RuntimeError, lambda: engine.backward(output)),
        message_of(RuntimeError, engine.step),
        message_of(RuntimeError, lambda: engine.load_checkpoint(folder)),
    ]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_does_not_go_on_after_a_failed_backward(ranks, stage, tmp_path):
    for backward, step, load in ranks(2).run(fail_in_backward, stage, str(tmp_path)):
        assert "at step 2 ended with Boom" in backward and "incomplete on this rank" in backward
        assert "newest checkpoint" in backward
        assert step == load == backward


# ---- parameters that leave -------------------------------------------------------------------------------------------
def lose(stage: int, how: str) -> str:
    engine = engine_for(config(stage, 1, clip=0.0, precision="bf16"), kind="frozen")
    advance(engine, 0, 1)
    model = engine.module
    if how == "float":
        model.float()
    elif how == "data":
        model.blocks[2].down.weight.data = torch.zeros(13, 29, dtype=torch.bfloat16)
    else:
        model.blocks[1].up.requires_grad_(True)
    return message_of(RuntimeError, lambda: advance(engine, 1, 2))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("float", "parameter scale is no longer where"),
        ("data", "parameter blocks.2.down.weight is no longer where"),
        ("thaw", "parameter blocks.1.up.weight was frozen"),
    ],
)
def test_a_parameter_that_leaves_or_thaws_is_named(ranks, stage, how, words):
    if (stage, how) == (3, "data"):
        pytest.skip("the next gather puts it back")
    assert all(words in message for message in ranks(1 if how == "float" else 2).run(lose, stage, how))


def late_groups() -> list[str]:
    engine = engine_for(config(1, 1, clip=0.0))
    extra = {"params": [torch.nn.Parameter(torch.zeros(3))]}
    found = [
        message_of(RuntimeError, lambda: engine.optimizer.add_param_group(extra)),
        message_of(RuntimeError, engine.optimizer.state_dict),
        message_of(RuntimeError, lambda: engine.optimizer.load_state_dict({})),
    ]
    engine.optimizer.param_groups[0]["params"].append(extra["params"][0])  # as the script's own optimizer would
    found.append(message_of(RuntimeError, lambda: advance(engine, 0, 1)))
    return found


def test_groups_and_states_of_the_optimizer(ranks):
    (messages,) = ranks(1).run(late_groups)
    words = ["after initialize()", "engine.save_checkpoint", "engine.load_checkpoint", "after initialize()"]
    assert all(word in message for word, message in zip(words, messages, strict=True)), messages
