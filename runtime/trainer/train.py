"""The built-in trainer: builds model and data from the config and runs the training loop."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.comm import init_distributed
from runtime.config import Resolved
from runtime.data.corpus import load_text
from runtime.data.order import Batches, Order
from runtime.engine.engine import Engine
from runtime.engine.initialize import initialize
from runtime.models.gpt import build_model
from runtime.wire.startnote import tell_start
from runtime.zero.init import Init

log = logging.getLogger("runtime.train")


def train(config: Resolved, folder: Path) -> None:
    """Train the model that `config` describes; relative globs in it start in `folder`."""
    if config.zerotop.model.path is not None:
        from runtime.trainer.finetune import finetune

        finetune(config, folder)
        return
    init_distributed()
    section = config.zerotop
    torch.manual_seed(section.train.seed)
    data = section.data
    tell_start("preparing data")
    tokenizer, text = load_text(data.files, data.tokenizer, data.seq_len, folder, log.info)
    order = Order(section.train.seed, len(text), config.global_batch)
    batches = Batches(text, order, config.micro_batch, config.accumulation, dist.get_rank(), dist.get_world_size())
    tell_start("building the model")
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
    engine.nonfinite.first_ends_run = True
    for step in range(engine.global_steps, steps):
        for batch in batches.micro_batches(step):
            # Copies from memory that is not pinned may wait for all that the GPU has still to do.
            tokens, targets = (batch.pin() if engine.device.type == "cuda" else batch).to(engine.device)
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
