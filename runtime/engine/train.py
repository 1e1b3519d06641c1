"""The built-in trainer: builds model and data from the config and runs the training loop."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.comm import init_distributed
from runtime.config import Resolved
from runtime.data.corpus import load_text
from runtime.data.order import Batches, Order
from runtime.engine.engine import Engine
from runtime.engine.initialize import initialize
from runtime.engine.nonfinite import TrainingError
from runtime.models.gpt import build_model
from runtime.zero.init import Init

log = logging.getLogger("runtime.train")


def train(config: Resolved, folder: Path) -> None:
    """Train the model that `config` describes; relative globs in it start in `folder`."""
    init_distributed()
    section = config.zerotop
    torch.manual_seed(section.train.seed)
    data = section.data
    tokenizer, text = load_text(data.files, data.tokenizer, data.seq_len, folder, log.info)
    order = Order(section.train.seed, len(text), config.global_batch)
    batches = Batches(text, order, config.micro_batch, config.accumulation, dist.get_rank(), dist.get_world_size())
    with Init():
        model = build_model(section.model, tokenizer.vocab_size, data.seq_len, "cpu")
    if (checkpointing := config.activation_checkpointing) is not None:
        model.checkpoint_activations(checkpointing.number_checkpoints, checkpointing.cpu_checkpointing)
    engine, _, _, _ = initialize(model=model, config=config)
    run(engine, batches, section.train.steps)
    engine.finish()


def run(engine: Engine, batches: Batches, steps: int | None) -> None:
    """Run optimizer steps until `engine.global_steps` is `steps`; a resumed engine starts at its checkpoint's step."""
    assert steps is not None  # resolve() fills it in where there is no script
    engine.train()
    for step in range(engine.global_steps, steps):
        for batch in batches.micro_batches(step):
            tokens, targets = batch.to(engine.device)
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
        check(engine, step + 1)


def check(engine: Engine, step: int) -> None:
    """Raise TrainingError if the gradient norm of `step` is not finite, except under fp16: going on would only hide
    where it began."""
    norm = engine.get_global_grad_norm()
    if engine.config.precision == "fp16":
        return  # the loss scale handles overflows, and the engine raises when it cannot
    if norm is not None and not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm is {norm} at step {step}{engine.nonfinite.describe_culprits()}: lower "
            "optimizer.params.lr, set gradient_clipping, or look at the data; "
            "launch with --resume to continue from the newest checkpoint",
            engine.nonfinite.culprit,
        )
