"""A checkpoint that does not fit is refused with its first difference before anything changes: training goes on as if
nobody had asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint import CheckpointError, read_manifest
from runtime.checkpoint.format.manifest import MANIFEST
from tests.numerics.models import Uneven
from tests.numerics.training import config, message_of

SGD = {"type": "SGD", "params": {"lr": 1e-3}}


class Variant(Uneven):
    """Differs from the model that wrote the checkpoint in what its name says."""

    def __init__(self, kind: str) -> None:
        super().__init__(unused=kind == "parameter more")
        shapes = {"buffer turned": (3, 2), "buffer larger": (2, 4)}
        if kind != "buffer less":
            self.register_buffer("offset", torch.zeros(shapes.get(kind, (2, 3))))
        if kind == "buffer more":
            self.register_buffer("more", torch.ones(4))
        if kind == "parameter less":
            del self.scale
            self.scale = 1.0
        if kind == "shape":
            self.blocks[2].up = torch.nn.Linear(13, 31)
            self.blocks[2].down = torch.nn.Linear(31, 13, bias=False)
        if kind == "dtype":
            self.embedding.to(torch.bfloat16)
            self.embedding.register_forward_hook(lambda _module, _given, found: found.float())


class Run:
    def __init__(self, kind: str, stage: int) -> None:
        from runtime.engine.initialize import initialize

        torch.manual_seed(1)
        model = Variant(kind)
        settings = config(stage, 1, clip=0.5, optimizer="RMSprop" if kind == "optimizer" else "AdamW")
        if kind in ("sgd", "momentum"):
            settings["optimizer"] = SGD
        if kind == "momentum":
            settings["optimizer"] = {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}
        settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}
        parameters: Any = list(model.parameters())
        if kind == "groups":
            parameters = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 1e-4}]
        rows = torch.randint(37, (24, 7), generator=torch.Generator().manual_seed(3))
        data = torch.utils.data.TensorDataset(rows[:, :-1], rows[:, 1:])
        self.engine, _, self.loader, self.scheduler = initialize(
            model=model, model_parameters=parameters, config=settings, training_data=data
        )

    def train(self, steps: int) -> list[float]:
        losses: list[float] = []
        while True:
            for tokens, targets in self.loader:
                loss = self.engine(tokens, targets) + 0.1 * torch.rand(1).mean()
                self.engine.backward(loss)
                self.engine.step()
                losses.append(loss.item())
                if len(losses) == steps:
                    return losses

    def unsharded(self) -> dict[str, Any]:
        """All that a load could change on this rank."""
        from runtime.checkpoint.content.capture import pieces_of, replicated_tensors

        engine = self.engine
        tensors = {name: piece.tensor.clone() for name, piece in pieces_of(engine.state).items()}
        tensors |= {name: tensor.clone() for name, tensor in replicated_tensors(engine.state).items()}
        tensors |= {f"module {name}": value.clone() for name, value in engine.module.state_dict().items()}
        tensors["rng"] = torch.get_rng_state()
        counts = (
            engine.global_steps,
            engine.state.counters.optimizer_steps,
            engine.micro_steps,
            engine.state.counters.lr_factor,
        )
        return {
            **tensors,
            "rest": (counts, engine.get_lr(), self.scheduler.state_dict(), self.loader.state_dict()),
            "client_state": dict(engine.script.client_state),
        }


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def write(folder: str, kinds: list[str]) -> None:
    for kind in kinds:
        run = Run(kind, 2)
        run.train(3)
        run.engine.save_checkpoint(f"{folder}/{kind}", client_state={"from": kind})


def refused(folder: str, kinds: list[tuple[str, str, bool]], stage: int) -> list[tuple[str, list[str], bool]]:
    """(what the checkpoint is of, what the engine is, strict) each: the message, what changed, and whether training
    went on as it would have."""
    outcomes = []
    for of, kind, strict in kinds:
        undisturbed = Run(kind, stage)
        unbroken, end = undisturbed.train(4), undisturbed.unsharded()
        run = Run(kind, stage)
        losses = run.train(2)
        before = run.unsharded()
        text = message_of(
            CheckpointError, partial(run.engine.load_checkpoint, f"{folder}/{of}", load_module_strict=strict)
        )
        after = run.unsharded()
        changed = [name for name in before if not same(before[name], after[name])]
        assert before.keys() == after.keys()
        losses += run.train(2)
        final = run.unsharded()
        outcomes.append((text, changed, losses == unbroken and all(same(end[name], final[name]) for name in end)))
    return outcomes


LEAVES = "(load_module_strict=False ignores names that only one of them has)"
CASES = {
    ("plain", "shape", True): "parameter blocks.2.down.weight has shape [13, 29] in the checkpoint and has shape "
    "[13, 31] in the model",
    ("plain", "shape", False): "parameter blocks.2.down.weight has shape [13, 29] in the checkpoint",
    ("plain", "parameter more", True): f"parameter idle.bias does not exist in the checkpoint and has shape [3] in the "
    f"model {LEAVES}",
    ("plain", "parameter less", True): f"parameter scale has shape [1] in the checkpoint and does not exist in the "
    f"model {LEAVES}",
    ("plain", "buffer more", True): f"buffer more does not exist in the checkpoint and has shape [4] in the model "
    f"{LEAVES}",
    ("plain", "buffer less", True): f"buffer offset has shape [2, 3] in the checkpoint and does not exist in the model "
    f"{LEAVES}",
    ("plain", "buffer turned", True): "buffer offset has shape [2, 3] in the checkpoint and has shape [3, 2] in the "
    "model",
    ("plain", "buffer larger", False): "buffer offset has shape [2, 3] in the checkpoint and has shape [2, 4] in the",
    ("early", "buffer larger", True): "buffer offset has 6 elements in the checkpoint and has shape [2, 4] in the",
    ("early", "buffer more", True): f"buffer more does not exist in the checkpoint and has shape [4] in the model "
    f"{LEAVES}",
    ("plain", "optimizer", True): "was saved with optimizer AdamW, the config has RMSprop: set optimizer.type to AdamW",
    ("plain", "groups", True): "has 1 parameter groups, the optimizer has 2: make the same parameter groups",
    ("sgd", "momentum", True): "has no optimizer state momentum_buffer of scale, which SGD needs with the "
    "current optimizer.params",
}  # fmt: skip


def make_early(folder: Path) -> None:
    """What a version wrote that said nothing about buffers."""
    (path,) = (path for path in folder.iterdir() if path.is_dir())
    manifest = read_manifest(path).model_copy(update={"buffers": None})
    (path / MANIFEST).write_bytes(manifest.sealed())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_first_difference_is_named_and_nothing_changes(ranks, tmp_path, stage):
    ranks(2).run(write, str(tmp_path), ["plain", "sgd"])
    ranks(2).run(write, str(tmp_path / "more"), ["plain"])
    make_early((tmp_path / "more" / "plain").rename(tmp_path / "early"))
    for outcomes in ranks(2).run(refused, str(tmp_path), list(CASES), stage):
        for (case, expected), (text, changed, went_on) in zip(CASES.items(), outcomes, strict=True):
            assert expected in text and str(tmp_path) in text, (case, text)
            assert (changed, went_on) == ([], True), case


def accepted(folder: str, kinds: list[tuple[str, dict[str, bool]]]) -> list[dict[str, Any]]:
    outcomes = []
    for kind, options in kinds:
        run = Run(kind, 1)
        run.train(2)
        run.engine.load_checkpoint(f"{folder}/plain", **options)
        assert run.engine.script.client_state == {"from": "plain"}
        outcomes.append({name: value.clone() for name, value in run.engine.module.state_dict().items()})
        run.train(1)
    return outcomes


def module_of(folder: str) -> dict[str, torch.Tensor]:
    run = Run("plain", 1)
    run.engine.load_checkpoint(f"{folder}/plain")
    return {name: value.clone() for name, value in run.engine.module.state_dict().items()}


def test_what_may_differ(ranks, tmp_path):
    """dtypes always; the optimizer where its states are not asked for; with load_module_strict=False what only one of
    them has."""
    ranks(2).run(write, str(tmp_path), ["plain"])
    theirs = ranks(2).run(module_of, str(tmp_path))[0]
    lax = {"load_module_strict": False}
    kinds = [("dtype", {}), ("optimizer", {"load_optimizer_states": False}), ("groups", {"load_module_only": True})]
    kinds += [(kind, lax) for kind in ("parameter more", "parameter less", "buffer more", "buffer less")]
    for outcomes in ranks(2).run(accepted, str(tmp_path), kinds):
        for (kind, _), ours in zip(kinds, outcomes, strict=True):
            for name in ours.keys() & theirs.keys():
                assert torch.equal(ours[name], theirs[name].to(ours[name].dtype)), (kind, name)
        assert outcomes[0]["embedding.weight"].dtype == torch.bfloat16
        assert outcomes[5]["more"].tolist() == [1.0] * 4
