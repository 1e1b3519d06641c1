"""Every step's loss is that of transformers.Trainer on one process with the same sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.packages import needs
from tests.harness.ranks import Ranks
from tests.harness.tiny_chat import prepared_in, save_chat_model, write_dialogues

needs("transformers")
STEPS, GLOBAL, LENGTH = 6, 8, 96
ADAMW = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def config(folder: str, world: int, stage: int, packing: bool, offload: bool) -> Any:
    from runtime.config import load

    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return load(
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": GLOBAL // (2 * world),
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "zerotop": {
                "model": {"path": "tiny"},
                "data": {"files": ["chats.jsonl"], "seq_len": LENGTH, "packing": packing, "workers": 1},
                "train": {"steps": STEPS},
            },
        }
    ).resolve(world, "cpu")


def of_zerotop(folder: str, stage: int, packing: bool, offload: bool) -> list[float]:
    """On a rank: the losses of the steps, by the trainer's own loop."""
    import torch.distributed as dist

    from runtime.engine.initialize import initialize
    from runtime.models.causal_lm import CausalLM
    from runtime.trainer.build import build_model
    from runtime.trainer.evaluation import Evaluator
    from runtime.trainer.finetune import run
    from runtime.zero.init import Init

    world = dist.get_world_size()
    resolved = config(folder, world, stage, packing, offload)
    ready = prepared_in(Path(folder), resolved.zerotop)
    with Init(weights=ready.folder):
        model = CausalLM(build_model(resolved, ready.config, len(ready.tokenizer)), "chunked")
    engine = initialize(model=model, config=resolved)[0]
    batches = ready.data.batches(2, resolved.accumulation, dist.get_rank(), world)
    losses: list[float] = []
    report = engine.steps._reporter.report
    engine.steps._reporter.report = lambda stats, *rest: (losses.append(stats.loss), report(stats, *rest))[1]
    run(engine, batches, Evaluator.of(engine, model, ready), STEPS)
    engine.finish()
    engine.destroy()
    batches.close()
    return losses


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The sequences in zerotop's order, with labels that are not shifted, padded to one length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return STEPS * GLOBAL

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, targets, positions = self.batches.sequences.batch([self.batches.order.window(index)])
        missing = LENGTH - tokens.shape[1]
        labels = targets.roll(1, dims=1)
        labels[:, 0] = -100
        pad = torch.nn.functional.pad
        return {
            "input_ids": pad(tokens[0], (0, missing)),
            "labels": pad(labels[0], (0, missing), value=-100),
            "position_ids": torch.cat([positions[0], torch.arange(missing) + positions[0, -1] + 1]),
        }


def of_transformers(folder: Path, packing: bool) -> list[float]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    ready = prepared_in(folder, config(str(folder), 1, 0, packing, False).zerotop)
    rows = Rows(ready.data.batches(GLOBAL, 1, 0, 1))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(ready.folder, dtype=torch.float32),
        train_dataset=rows,
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=GLOBAL // 2,
            max_steps=STEPS,
            learning_rate=ADAMW["lr"],
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=1e-8,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    )
    trainer.train()
    rows.batches.close()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    save_chat_model(path / "tiny")
    write_dialogues(path / "chats.jsonl", 40)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[bool, list[float]]:
    return {}


CASES = [
    pytest.param(stage, packing, offload, marks=() if (stage, packing, offload) in quick else pytest.mark.slow)
    for quick in [{(2, True, True), (3, True, False), (3, False, False)}]
    for stage in range(4)
    for packing in (True, False)
    for offload in (False, True)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stage", "packing", "offload"), CASES)
def test_losses_of_transformers_trainer(
    ranks: Any, folder: Path, theirs: dict[bool, list[float]], stage: int, packing: bool, offload: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if packing not in theirs:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        theirs[packing] = of_transformers(folder, packing)
    group: Ranks = ranks(2)
    outcomes = group.run(of_zerotop, str(folder), stage, packing, offload)
    assert len(theirs[packing]) == STEPS and theirs[packing][-1] < theirs[packing][0] - 0.1
    for losses in outcomes:
        assert losses == pytest.approx(theirs[packing], abs=1e-3)
    assert json.dumps(outcomes[0]) == json.dumps(outcomes[1])
