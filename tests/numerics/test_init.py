"""zero.Init with models as scripts make them: copied blocks, new heads and adapters, moved before initialize()."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import runtime as deepspeed
from runtime.config import ConfigError
from runtime.engine.initialize import initialize
from runtime.zero.absent import AbsentParameter
from tests.harness.waiting import patient
from tests.numerics.models import Block, Uneven, make
from tests.numerics.training import assert_equal, config, micro_batch, train_plainly

STAGES = [0, 3]


class Copied(Uneven):
    """Blocks that are copies of one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(self.blocks[0]) for _ in range(3))


class Cloned(nn.Module):
    """torch's encoder copies the layer that it is given."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Linear(16, 1)


class Adapted(nn.Module):
    """A low-rank adapter around a layer; `resets`: it says how it starts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Resetting(Adapted):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)


def distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values for a file that no initialisation draws."""
    generator = torch.Generator().manual_seed(5)
    return {name: 3 + torch.rand(value.shape, generator=generator) for name, value in model.state_dict().items()}


def assert_loaded(engine: Any, values: dict[str, torch.Tensor]) -> None:
    whole = engine.module.state_dict()
    wrong = [name for name, value in values.items() if not torch.equal(whole[name], value)]
    assert not wrong


# ---- never random instead of the file's ------------------------------------------------------------------------------
def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def converted(model: nn.Module) -> nn.Module:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


AFTERWARDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "other parameters": converted,
}


def built_under_weights(kind: type[nn.Module], on_meta: bool, afterwards: str, stage: int, path: str) -> None:
    values = distinct(kind())
    with deepspeed.zero.Init(weights=path), torch.device("meta" if on_meta else "cpu"):
        model = kind()
    model = AFTERWARDS[afterwards](model)
    assert all(parameter.is_meta for parameter in model.parameters())
    engine = initialize(model=model, config=config(stage, 1, clip=0.0))[0]
    assert_loaded(engine, values)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("kind", [Copied, Cloned])
def test_copied_modules_have_the_files_values(ranks, tmp_path: Path, kind, on_meta, stage):
    save_file(distinct(kind()), tmp_path / "m.safetensors")
    ranks(2).run(built_under_weights, kind, on_meta, "nothing", stage, str(tmp_path))


@pytest.mark.parametrize("afterwards", AFTERWARDS)
def test_whatever_happens_to_the_model_it_has_the_files_values(ranks, tmp_path: Path, afterwards):
    save_file(distinct(Uneven()), tmp_path / "m.safetensors")
    ranks(2).run(built_under_weights, Uneven, False, afterwards, 3, str(tmp_path))


def tied(path: str) -> None:
    with deepspeed.zero.Init(weights=path):
        model = Uneven(tied=True)
    values = distinct(Uneven())
    values["embedding.weight"] = values["head.weight"]
    assert_loaded(initialize(model=model, config=config(3, 1, clip=0.0))[0], values)


def test_tied_weights_are_found_under_any_of_their_names(ranks, tmp_path: Path):
    values = distinct(Uneven())
    del values["embedding.weight"]
    save_file(values, tmp_path / "m.safetensors")
    ranks(2).run(tied, str(tmp_path))


# ---- new parameters --------------------------------------------------------------------------------------------------
class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("runtime.setup").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def with_new_head(stage: int, path: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    rank = dist.get_rank()
    with deepspeed.zero.Init(weights=path):
        model = Uneven()
        model.classes = nn.Linear(13, 2)
    values, log = distinct(Uneven()), Lines()
    torch.manual_seed(7)
    after = torch.rand(1)
    torch.manual_seed(7)
    try:
        engine = initialize(model=model, config=config(stage, 1, clip=0.0))[0]
    finally:
        logging.getLogger("runtime.setup").removeHandler(log)
    assert torch.equal(torch.rand(1), after), "the ranks' random states parted"
    torch.manual_seed(7)
    drawn = nn.Linear(13, 2)
    values |= {"classes.weight": drawn.weight.detach(), "classes.bias": drawn.bias.detach()}
    assert_loaded(engine, values)
    engine.backward(engine(*micro_batch(0, 0, rank, 2)))
    engine.step()
    return log.lines, {name: value.clone() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_new_head_is_drawn_and_named_in_one_warning(ranks, tmp_path: Path, stage, prefix):
    save_file({prefix + name: value for name, value in distinct(Uneven()).items()}, tmp_path / "m.safetensors")
    (lines, first), (silence, second) = ranks(2).run(with_new_head, stage, str(tmp_path))
    assert len(lines) == 1 and "2 of the model's 22 parameters" in lines[0]
    assert lines[0].endswith("classes.weight, classes.bias")
    assert not silence
    assert_equal(first, second, tolerance=0.0)


def with_head_beside(path: str) -> None:
    with deepspeed.zero.Init(weights=path):
        model = nn.Module()
        model.body = Uneven()
        model.classes = nn.Linear(13, 2)
    values = {f"body.{name}": value for name, value in distinct(Uneven()).items()}
    assert_loaded(initialize(model=model, config=config(3, 1, clip=0.0))[0], values)


def test_a_model_around_the_one_that_was_stored(ranks, tmp_path: Path):
    save_file(distinct(Uneven()), tmp_path / "m.safetensors")
    ranks(2).run(with_head_beside, str(tmp_path))


def adapted(kind: type[Adapted]) -> nn.Module:
    model = Uneven()
    for block in model.blocks[:2]:
        block.up = kind(block.up)
    return model


def with_adapters(path: str) -> None:
    with deepspeed.zero.Init(weights=path):
        model = adapted(Resetting)
    engine = initialize(model=model, config=config(3, 1, clip=0.0))[0]
    whole = engine.module.state_dict()
    assert_loaded(engine, distinct_of_base())
    for index in (0, 1):
        assert torch.equal(whole[f"blocks.{index}.up.up"], torch.zeros(29, 2))
        assert 0 < whole[f"blocks.{index}.up.down"].abs().max() < 6
    assert not torch.equal(whole["blocks.0.up.down"], whole["blocks.1.up.down"])


def distinct_of_base() -> dict[str, torch.Tensor]:
    return {name: value for name, value in distinct(adapted(Resetting)).items() if name.split(".")[-1] not in NEW}


NEW = ("up", "down")


def test_adapters_are_drawn(ranks, tmp_path: Path):
    save_file(distinct_of_base(), tmp_path / "m.safetensors")
    ranks(2).run(with_adapters, str(tmp_path))


def refused(kind: type[Adapted] | None, path: str) -> str:
    with deepspeed.zero.Init(weights=path):
        model = adapted(kind) if kind else Uneven()
    with pytest.raises(ConfigError) as caught:
        initialize(model=model, config=config(3, 1, clip=0.0))
    assert all(parameter.is_meta for parameter in model.parameters())
    return str(caught.value)


def test_what_nobody_can_draw_is_refused(ranks, tmp_path: Path):
    save_file(distinct_of_base(), tmp_path / "m.safetensors")
    for text in ranks(2).run(refused, Adapted, str(tmp_path)):
        assert "lacks blocks.0.up.down and 3 more" in text and "reset_parameters()" in text


def test_another_models_weights_are_refused(ranks, tmp_path: Path):
    values = distinct(Uneven())
    kept = sorted(values)[:10]  # of 20: not more than half
    save_file({name: values[name] for name in kept}, tmp_path / "m.safetensors")
    for text in ranks(2).run(refused, None, str(tmp_path)):
        assert "and 9 more of the model's parameters" in text and "give the weights of this model" in text


def other_files_on_rank_1(folder: str) -> str:
    with (
        pytest.raises(ConfigError) as caught,
        deepspeed.zero.Init(weights=f"{folder}/{dist.get_rank()}.safetensors"),
    ):
        Uneven()
    return str(caught.value)


def test_files_that_differ_between_nodes_are_everybodys_error(ranks, tmp_path: Path):
    values = distinct(Uneven())
    save_file(values, tmp_path / "0.safetensors")
    del values["head.weight"]
    save_file(values, tmp_path / "1.safetensors")
    assert all("the tensors that rank 1 finds" in text for text in ranks(2).run(other_files_on_rank_1, str(tmp_path)))


# ---- moved before initialize() ---------------------------------------------------------------------------------------
MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to device": lambda model: model.to("cpu"),
    "to device and dtype": lambda model: model.to(torch.device("cpu"), torch.float64).to(torch.float32),
    "to like": lambda model: model.to(torch.zeros(1)),
    "by keyword": lambda model: model.to(device="cpu", non_blocking=True),
    "cpu": lambda model: model.cpu(),
    "float": lambda model: model.double().float(),
    "after deepcopy": lambda model: copy.deepcopy(model).to("cpu"),
    "after pickle": lambda model: pickled(model).to("cpu"),
    "twice": lambda model: model.to("cpu").to("cpu", torch.float64).to("cpu", torch.float32),
}


def moved(stage: int, move: str) -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    with deepspeed.zero.Init():
        model = make("tied")
        model.register_buffer("table", torch.ones(3))
    model = MOVES[move](model)
    assert all(parameter.is_meta == (rank != 0) for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert not model.table.is_meta and model.table.dtype == torch.float32
    engine = initialize(model=model, config=config(stage, 1, clip=0.5))[0]
    assert not any(isinstance(parameter, AbsentParameter) for parameter in model.parameters())
    for step in range(4):
        engine.backward(engine(*micro_batch(step, 0, rank, 2)))
        engine.step()
    whole = engine.module.state_dict()
    return {name: whole[name].clone() for name, _ in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("move", MOVES)
def test_models_move_on_every_rank_before_initialize(ranks, move, stage):
    plain = train_plainly("tied", 2, 1, clip=0.5, steps=4)
    for ours in ranks(2).run(moved, stage, move):
        assert_equal(ours, plain)


def changes_dtype(call: str, path: str) -> None:
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32}[call]
    with deepspeed.zero.Init(weights=path):
        model = make("normed")
    model = getattr(model, call)()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.batch_norm.running_mean.dtype == dtype
    gain = model.norm.weight
    assert gain.cuda() is gain and gain.cuda(0) is gain and gain.to("cuda") is gain  # no GPU is asked for
    assert gain.to("cuda", torch.float64).dtype == torch.float64 and gain.is_meta
    engine = initialize(model=model, config=config(3, 1, clip=0.0, precision="bf16"))[0]
    expected = {name: value.to(torch.bfloat16) for name, value in distinct(Block(13, 29)).items()}
    assert_loaded(engine, {f"blocks.1.{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("call", ["bfloat16", "half", "float"])
def test_dtypes_change_before_initialize(ranks, tmp_path: Path, call):
    values = {name: value for name, value in make("normed").state_dict().items() if "running" not in name}
    values |= {f"blocks.1.{name}": value for name, value in distinct(Block(13, 29)).items()}
    save_file(values, tmp_path / "m.safetensors")
    ranks(2).run(changes_dtype, call, str(tmp_path))


class Sharing(nn.Module):
    """One parameter given to two modules, and a module made of another's parameter."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(37, 13))
        self.embedding, self.head = nn.Embedding(37, 13), nn.Linear(13, 37, bias=False)
        self.embedding.weight = weight
        self.head.weight = weight
        self.other = nn.Embedding.from_pretrained(self.head.weight, freeze=False)


def sharing() -> int:
    with deepspeed.zero.Init():
        model = Sharing()
    assert model.head.weight is model.embedding.weight
    engine = initialize(model=model, config=config(3, 1, clip=0.0))[0]
    return len(list(engine.module.parameters()))


def test_parameters_stay_shared_on_every_rank(ranks):
    assert ranks(2).run(sharing) == [2, 2]


# ---- what building costs a rank that has no values -------------------------------------------------------------------
BUILD = """
import sys
import torch
from torch import nn
import runtime as deepspeed
from runtime.models.gpt import GPT
from runtime.config.presets import PRESETS

before = set(sys.modules)
with deepspeed.zero.Init(weights=sys.argv[1]):
    model = GPT(PRESETS["gpt-tiny"])
    other = nn.TransformerEncoderLayer(16, 2, 32)
    other.linear1.weight.data.normal_(std=0.02)
    nn.init.trunc_normal_(other.linear2.weight)
    if torch.__version__ >= "2.13":  # before, torch asks its compiler about the shape of a matrix
        nn.init.orthogonal_(nn.Linear(4, 4).weight)
assert all(parameter.is_meta for parameter in model.parameters())
grown = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted({"sympy", "networkx"} & grown), "torch._dynamo" in sys.modules)
"""


def test_building_without_values_does_not_import_a_compiler(tmp_path: Path):
    """torch imports one to draw on the meta device: 800 modules on every rank but the first."""
    save_file({"embedding.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(100), check=False)
    assert (done.returncode, done.stdout) == (0, "[] False\n"), done.stderr


# ---- before the engine -----------------------------------------------------------------------------------------------
def gather_before_the_engine() -> dict[str, Any]:
    import torch.distributed as dist

    from runtime.zero import ZeroParamStatus

    rank = dist.get_rank()
    with deepspeed.zero.Init():
        layer = nn.Linear(3, 2)
        with deepspeed.zero.GatheredParameters(layer.weight):
            inside = layer.weight.detach().clone()
    same, status = layer.weight, [layer.weight.ds_status]
    with deepspeed.zero.GatheredParameters([layer.weight, None, layer.bias], modifier_rank=1), torch.no_grad():
        status.append(layer.weight.ds_status)
        read = layer.weight.detach().clone()
        if rank == 1:
            layer.weight.fill_(7)
    status.append(layer.weight.ds_status)
    with deepspeed.zero.GatheredParameters(layer.parameters(), modifier_rank=0):
        changed = layer.weight.detach().clone()
        graph = layer.bias.sum()  # refers to a parameter beyond the context
        if rank == 0:
            layer.bias.data.fill_(5)
    absent = (layer.weight.is_meta, same is layer.weight, graph.requires_grad)
    engine = initialize(model=layer, config=config(3, 1, clip=0.0))[0]
    return {
        "read": (inside, read),
        "status": [one is ZeroParamStatus.AVAILABLE for one in status],
        "changed": changed,
        "absent": absent,
        "trained": {name: value.clone() for name, value in engine.state_dict().items()},
    }


def test_what_zero_init_built_can_be_gathered_before_the_engine(ranks):
    results = ranks(2).run(gather_before_the_engine)
    for rank, found in enumerate(results):
        for values in found["read"]:
            assert torch.equal(values, results[0]["read"][0]) and values.abs().sum() > 0
        assert found["status"] == [False, True, False]
        assert torch.equal(found["changed"], torch.full((2, 3), 7.0))
        assert found["absent"] == (rank != 0, True, True)
        assert torch.equal(found["trained"]["weight"], torch.full((2, 3), 7.0))
        assert torch.equal(found["trained"]["bias"], torch.full((2,), 5.0))
