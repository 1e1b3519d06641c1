"""A resumed fine-tuning run repeats itself bit for bit, in the middle of a packed epoch and of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.packages import needs
from tests.harness.tiny_chat import prepared_in, save_chat_model, write_dialogues

needs("transformers")
STEPS, SAVED = 9, 4


def trained(folder: str, streaming: bool, checkpoints: str, resume: bool) -> list[float]:
    """On a rank: the losses of the steps; half-way a checkpoint is made, or with `resume` it is the start."""
    import torch.distributed as dist

    from runtime.config import load
    from runtime.data.conversations.streaming import StreamingBatches
    from runtime.engine.initialize import initialize
    from runtime.models.causal_lm import CausalLM
    from runtime.trainer.build import build_model
    from runtime.trainer.evaluation import Evaluator
    from runtime.trainer.finetune import run
    from runtime.zero.init import Init

    data = {"files": ["chats.jsonl"], "seq_len": 96, "workers": 1, "streaming": streaming, "segment_rows": 12}
    config = load(
        {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "zerotop": {"model": {"path": "tiny"}, "data": data, "train": {"steps": STEPS}},
        }
    ).resolve(dist.get_world_size(), "cpu")
    ready = prepared_in(Path(folder), config.zerotop)
    with Init(weights=ready.folder):
        model = CausalLM(build_model(config, ready.config, len(ready.tokenizer)), "chunked")
    engine = initialize(model=model, config=config)[0]
    if resume:
        engine.load_checkpoint(checkpoints)
    batches = ready.data.batches(2, config.accumulation, dist.get_rank(), dist.get_world_size())
    if isinstance(batches, StreamingBatches):
        engine.register_state(stream=batches)
    evaluator = Evaluator.of(engine, model, ready)
    losses: list[float] = []
    report = engine.steps._reporter.report
    engine.steps._reporter.report = lambda stats, *rest: (losses.append(stats.loss), report(stats, *rest))[1]
    if not resume:
        run(engine, batches, evaluator, SAVED)
        engine.save_checkpoint(checkpoints)
    run(engine, batches, evaluator, STEPS)
    engine.finish()
    engine.destroy()
    batches.close()
    return losses


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_repeats_itself(ranks: Any, tmp_path: Path, streaming: bool) -> None:
    save_chat_model(tmp_path / "tiny")
    write_dialogues(tmp_path / "chats.jsonl", 60)
    (whole, _), (rest, _) = (
        ranks(2).run(trained, str(tmp_path), streaming, str(tmp_path / "checkpoints"), resume)
        for resume in (False, True)
    )
    assert len(whole) == STEPS and len(set(whole)) == STEPS
    assert rest == whole[SAVED:]
