"""A checkpoint is read by runs that differ from the one that wrote it in world size, stage, precision and offload: the
same bits of masters and states, the same data order, and, in one precision, the loss of the unbroken run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.config import Fp16Config, Resolved, load
from tests.harness.grids import covering
from tests.numerics.models import Uneven
from tests.numerics.remote import remote_device

GLOBAL_BATCH, MICRO_BATCH, SAMPLES = 12, 2, 72
HALF = 3


@dataclass(frozen=True)
class Setup:
    """How a run is made."""

    world: int = 2
    stage: int = 2
    precision: str = "fp32"
    offload: str = "none"
    """none, states (of the optimizer), or all (the parameters, too; at stage 3)."""

    def config(self, optimizer: dict[str, Any] | None = None) -> Resolved:
        zero: dict[str, Any] = {"stage": self.stage, "stage3_param_persistence_threshold": 0}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "all":
            zero["offload_param"] = {"device": "cpu"}
        adamw = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}}
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // self.world,
            "gradient_clipping": 0.5,
            "zero_optimization": zero,
            "optimizer": optimizer or adamw,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "linear"}},
        }
        if self.precision == "bf16":
            found["bf16"] = {"enabled": True}
        resolved = load(found).resolve(self.world, "cpu", script=True)
        if self.precision != "fp16":
            return resolved
        scaling = Fp16Config(initial_scale_power=6, loss_scale_window=2)
        return resolved.model_copy(update={"precision": "fp16", "fp16": scaling})  # which the config is for GPUs only


SETUPS = [
    Setup(world, stage, precision, offload)
    for world, stage, precision, offload in itertools.product(
        (1, 2, 3), range(4), ("fp32", "bf16", "fp16"), ("none", "states", "all")
    )
    if offload != "all" or stage == 3
]


def _values(setups: tuple[Setup, ...]) -> list[Any]:
    return [value for s in setups for value in (s.world, s.stage, s.precision, s.offload)]


def differ(one: Setup, other: Setup) -> int:
    return sum(a != b for a, b in zip(_values((one,)), _values((other,)), strict=True))


SELECTED = covering(
    ((writer, reader) for writer in SETUPS for reader in SETUPS if differ(writer, reader) == 4), _values
)
ACROSS = covering(
    (
        (writer, reader)
        for writer in SETUPS
        for reader in SETUPS
        if writer.precision == reader.precision == "fp32" and differ(writer, reader) == 3
    ),
    _values,
)
ALIKE = [setup for (setup,) in covering(((setup,) for setup in SETUPS), _values)]


# ---- on ranks --------------------------------------------------------------------------------------------------------
class Model(Uneven):
    """With a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__(frozen=True)
        self.register_buffer("offset", torch.linspace(-1, 1, 6).view(2, 3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens, targets) + self.offset.float().sum()


class Run:
    def __init__(self, setup: Setup, optimizer: dict[str, Any] | None = None, frozen: bool = True) -> None:
        from runtime.engine.initialize import initialize

        torch.manual_seed(1)
        model = Model()
        if not frozen:
            model.requires_grad_(True)
        rows = torch.randint(37, (SAMPLES, 7), generator=torch.Generator().manual_seed(3))
        data = torch.utils.data.TensorDataset(rows[:, :-1], rows[:, 1:], torch.arange(SAMPLES))
        apart = remote_device("prompt") if setup.offload != "none" else contextlib.nullcontext()
        with apart:
            self.engine, _, self.loader, self.scheduler = initialize(
                model=model, config=setup.config(optimizer), training_data=data
            )

    def train(self, steps: int) -> tuple[list[float], list[list[int]]]:
        """Mean loss of all ranks and (unordered) samples of all ranks, for each of `steps` optimizer steps."""
        engine, end = self.engine, self.engine.global_steps + steps
        losses: list[float] = []
        samples: list[list[int]] = []
        total, seen = 0.0, []
        while engine.global_steps < end:
            for tokens, targets, numbers in self.loader:
                before = engine.global_steps
                loss = engine(tokens, targets)
                engine.backward(loss)
                engine.step()
                total += loss.item() / engine.gradient_accumulation_steps()
                seen += numbers.tolist()
                if engine.global_steps == before:
                    continue
                everyone = engine.comm.gather_objects((total, seen))
                losses.append(sum(part for part, _ in everyone) / len(everyone))
                samples.append(sorted(number for _, part in everyone for number in part))
                total, seen = 0.0, []
                if engine.global_steps == end:
                    break
        return losses, samples

    def tensors(self) -> dict[str, torch.Tensor]:
        """Whole masters, optimizer states, frozen parameters and buffers by name."""
        from runtime.checkpoint.content.capture import blocks_of

        self.engine.synchronize()
        mine = [
            (part.name, part.total, part.start, part.numel, part.dtype, block.view(at, part).clone())
            for block in blocks_of(self.engine.state)
            for at, part in block.parts
        ]
        whole: dict[str, torch.Tensor] = {}
        for name, total, start, numel, dtype, piece in itertools.chain(*self.engine.comm.gather_objects(mine)):
            found = whole.setdefault(name, torch.full((total,), torch.nan).to(piece.dtype))
            assert str(found.dtype) == f"torch.{dtype}"
            found[start : start + numel] = piece
        return whole

    def facts(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "steps": (engine.global_steps, engine.state.counters.optimizer_steps, engine.skipped_steps),
            "rates": engine.get_lr(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.loader.state_dict(),
            "scale": engine.state.scaler.state_dict(),
        }


def write(folder: str, setup: Setup, optimizer: dict[str, Any] | None = None) -> Any:
    """Tensors and facts at the checkpoint; then losses, samples and tensors of a run that goes on."""
    run = Run(setup, optimizer)
    run.train(HALF)
    run.engine.save_checkpoint(folder)
    at_checkpoint = run.tensors(), run.facts()
    return *at_checkpoint, run.train(HALF), run.tensors()


def read(folder: str, setup: Setup, optimizer: dict[str, Any] | None = None) -> Any:
    run = Run(setup, optimizer)
    run.train(1)  # what it has been doing must not matter
    run.engine.load_checkpoint(folder)
    loaded = run.tensors(), run.facts()
    return *loaded, run.train(HALF), run.tensors()


def on_rank_0(jobs: list[tuple[Any, ...]]) -> list[Any] | None:
    outcomes = [function(*arguments) for function, *arguments in jobs]
    return outcomes if dist.get_rank() == 0 else None


def run_all(ranks: Any, jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Each job is (function, folder, setup, ...), on the ranks of its setup; one call for all of a world."""
    outcomes: dict[int, Any] = {}
    for world in sorted({job[2].world for job in jobs}):
        mine = [index for index, job in enumerate(jobs) if job[2].world == world]
        outcomes |= zip(mine, ranks(world).run(on_rank_0, [jobs[index] for index in mine])[0], strict=True)
    return [outcomes[index] for index in range(len(jobs))]


def assert_read(written: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """The same bits; buffers and frozen parameters as the reader's precision rounds them."""
    assert found.keys() == written.keys()
    for name, value in written.items():
        same = found[name].dtype == value.dtype
        assert same or name.startswith(("buffer.", "param.blocks.1.up.")), name
        assert torch.equal(found[name], value.to(found[name].dtype)), name


# ---- tests -----------------------------------------------------------------------------------------------------------
def test_the_selection_covers_every_two_values():
    for position, values in enumerate((range(1, 4), range(4), ("fp32", "bf16", "fp16"), ("none", "states", "all"))):
        for side in (0, 1):
            assert {_values((pair[side],))[position] for pair in SELECTED} == set(values)
    assert len(SELECTED) <= 40 and len(ACROSS) <= 20 and len(ALIKE) <= 20


@pytest.fixture
def written(ranks, tmp_path):
    """Checkpoints of all writers: folder and outcome by setup."""

    def make(setups: Iterable[Setup]) -> dict[Setup, tuple[str, Any]]:
        unique = list(dict.fromkeys(setups))
        jobs = [(write, str(tmp_path / str(number)), setup) for number, setup in enumerate(unique)]
        return {job[2]: (job[1], outcome) for job, outcome in zip(jobs, run_all(ranks, jobs), strict=True)}

    return make


def test_readers_that_differ_in_everything_get_the_bits_that_were_written(ranks, written):
    made = written(writer for writer, _ in SELECTED)
    found = run_all(ranks, [(read, made[writer][0], reader) for writer, reader in SELECTED])
    for (writer, reader), (tensors, facts, (losses, samples), _) in zip(SELECTED, found, strict=True):
        theirs, their_facts, (_, their_samples), _ = made[writer][1]
        assert_read(theirs, tensors)
        assert samples == their_samples, (writer, reader)
        scale, their_scale = facts.pop("scale"), their_facts["scale"]
        assert facts == {name: fact for name, fact in their_facts.items() if name != "scale"}, (writer, reader)
        assert scale == their_scale or writer.precision != "fp16", (writer, reader)
        assert all(loss == loss for loss in losses)


def test_another_world_size_has_the_losses_of_the_unbroken_run(ranks, written):
    made = written(writer for writer, _ in ACROSS)
    found = run_all(ranks, [(read, made[writer][0], reader) for writer, reader in ACROSS])
    for (writer, reader), (tensors, facts, (losses, samples), _) in zip(ACROSS, found, strict=True):
        theirs, their_facts, (their_losses, their_samples), _ = made[writer][1]
        assert_read(theirs, tensors)
        assert (facts, samples) == (their_facts, their_samples), (writer, reader)
        assert losses == pytest.approx(their_losses, rel=1e-6), (writer, reader)


def test_the_same_setup_continues_bit_for_bit(ranks, written):
    made = written(ALIKE)
    found = run_all(ranks, [(read, made[setup][0], setup) for setup in ALIKE])
    for setup, (tensors, facts, went_on, end) in zip(ALIKE, found, strict=True):
        theirs, their_facts, they_went_on, their_end = made[setup][1]
        assert_read(theirs, tensors)
        assert (facts, went_on) == (their_facts, they_went_on), setup
        assert end.keys() == their_end.keys()
        assert all(torch.equal(value, end[name]) for name, value in their_end.items()), setup


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Adagrad": {"initial_accumulator_value": 0.3, "lr_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1},
    "Rprop": {},
    "Adam": {},
}


def from_the_start(folder: str, setup: Setup, optimizer: dict[str, Any]) -> Any:
    """A checkpoint from before the first step, and 3 steps."""
    run = Run(setup, optimizer)
    run.engine.save_checkpoint(folder)
    return run.train(HALF), run.tensors()


def back_to_the_start(folder: str, setup: Setup, optimizer: dict[str, Any]) -> Any:
    run = Run(setup, optimizer)
    run.train(2)
    run.engine.load_checkpoint(folder)
    return run.train(HALF), run.tensors()


# Of torch's, two are enough: one with states from the start, one that makes them in its first step.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("SGD", "Adagrad") else pytest.mark.slow) for kind in OPTIMIZERS],
)
def test_states_of_every_optimizer(ranks, tmp_path, kind):
    optimizer = {"type": kind, "params": {"lr": 1e-3, **OPTIMIZERS[kind]}}
    writer = Setup(2, 2)
    others = [writer, Setup(3, 0), Setup(3, 3, "fp32", "all"), Setup(2, 1, "bf16", "states")]
    late, early = str(tmp_path / "late"), str(tmp_path / "early")
    [(theirs, their_facts, went_on, end), first] = run_all(
        ranks, [(write, late, writer, optimizer), (from_the_start, early, writer, optimizer)]
    )
    *found, again = run_all(
        ranks,
        [*((read, late, other, optimizer) for other in others), (back_to_the_start, early, writer, optimizer)],
    )
    for other, (tensors, facts, (losses, samples), _) in zip(others, found, strict=True):
        assert_read(theirs, tensors)
        assert (facts, samples) == (their_facts, went_on[1])
        if other.precision == "fp32" and kind != "Rprop":  # which steps by signs: rounding flips some
            assert losses == pytest.approx(went_on[0], rel=1e-6)
    for ours, their in ((found[0][2:], (went_on, end)), (again, first)):
        assert ours[0] == their[0]
        assert all(torch.equal(value, ours[1][name]) for name, value in their[1].items())


def scale_there_and_back(folder: str) -> Any:
    scales = []
    for precision in ("fp16", "bf16", "fp32", "fp16"):
        run = Run(Setup(1, 1, precision))
        if scales:
            run.engine.load_checkpoint(folder)
        scales.append((run.engine.state.scaler.state_dict(), run.engine.loss_scale))
        run.train(2)
        if precision == "fp16":
            scales.append((run.engine.state.scaler.state_dict(), run.engine.loss_scale))
        run.engine.save_checkpoint(folder)
    return scales


def test_fp16s_loss_scale_waits_while_the_run_is_in_another_precision(ranks, tmp_path):
    (fresh, grown, in_bf16, in_fp32, again, later) = ranks(1).run(scale_there_and_back, str(tmp_path))[0]
    assert fresh[1] == 2**6 < grown[1]
    assert in_bf16 == in_fp32 == (grown[0], 1.0)
    assert again == grown and later[0]["updates"] == 4


def thaw(folder: str, kind: str) -> Any:
    """A layer that was frozen when the checkpoint was made is trained by an engine that has states for it already."""
    optimizer = {"type": kind, "params": {"lr": 1e-3, **OPTIMIZERS.get(kind, {})}}
    frozen = Run(Setup(2, 2), optimizer)
    frozen.train(1)
    frozen.engine.save_checkpoint(folder)
    whole = frozen.tensors()
    outcomes = []
    for before in (0, 2):
        thawed = Run(Setup(2, 1), optimizer, frozen=False)
        thawed.train(before)
        thawed.engine.load_checkpoint(folder)
        outcomes.append((thawed.tensors(), thawed.train(2), thawed.tensors()))
    return whole, outcomes


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_what_was_frozen_and_is_trained_begins_with_fresh_states(ranks, tmp_path, kind):
    whole, [fresh, used] = ranks(2).run(thaw, str(tmp_path), kind)[0]
    for name, value in whole.items():
        assert torch.equal(fresh[0][name], value), name
    new = fresh[0].keys() - whole.keys()
    assert new and all(".blocks.1.up." in name for name in new)
    for name in new:
        assert fresh[0][name].unique().tolist() == [pytest.approx(0.3 if kind == "Adagrad" else 0.0)]
    for ours, theirs in ((used[0], fresh[0]), (used[2], fresh[2])):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert used[1] == fresh[1]
