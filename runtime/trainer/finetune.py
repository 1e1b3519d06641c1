"""Fine-tuning of a Hugging Face model: builds model and data from the config and runs the training loop."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.comm import init_distributed
from runtime.config import ConfigError, Resolved
from runtime.data.conversations.batches import TrainingBatches
from runtime.data.conversations.streaming import StreamingBatches
from runtime.engine.engine import Engine
from runtime.engine.initialize import initialize
from runtime.models import huggingface
from runtime.models.activations import offload_activations
from runtime.models.causal_lm import CausalLM, Method
from runtime.models.cross_entropy import liger_problem
from runtime.models.origin import Origin
from runtime.trainer.build import build_model
from runtime.trainer.evaluation import Evaluator
from runtime.trainer.prepare import Ready, prepare
from runtime.wire.startnote import tell_start
from runtime.zero.init import Init

log = logging.getLogger("runtime.trainer")

Batches = TrainingBatches | StreamingBatches


def finetune(config: Resolved, folder: Path) -> None:
    """Fine-tune the model that `config` describes; relative paths in it start in `folder`."""
    device = init_distributed()
    torch.manual_seed(config.zerotop.train.seed)
    tell_start("preparing model and data")
    ready = prepare(config.zerotop, folder, log.info)
    tell_start("building the model")
    with Init(weights=ready.folder):
        model = CausalLM(build_model(config, ready.config, len(ready.tokenizer)), _method(config, device))
    model.origin = origin_of(config, folder, ready)
    engine, _, _, _ = initialize(model=model, config=config)
    if _offloads_activations(config):
        offload = offload_activations(list(huggingface.blocks(model.base)), ledger=engine.state.ledger)
        if config.activation_checkpointing is not None:
            huggingface.checkpoint_with(model.base, offload.checkpoint)
    batches = ready.data.batches(
        config.micro_batch,
        config.accumulation,
        dist.get_rank(),
        dist.get_world_size(),
        pin=device.type == "cuda",
    )
    if isinstance(batches, StreamingBatches):
        engine.register_state(stream=batches)
    if engine.comm.rank == 0:
        for report in ready.reports:
            engine.session.link.data_report(report)
    _check_loss(engine, model, batches)
    try:
        run(engine, batches, Evaluator.of(engine, model, ready), config.zerotop.train.steps)
        engine.finish()
    finally:
        batches.close()


def _offloads_activations(config: Resolved) -> bool:
    """Whether what the blocks save for backward (with checkpointing: their inputs) goes to host memory."""
    checkpointing = config.activation_checkpointing
    return config.zerotop.model.offload_activations or (checkpointing is not None and checkpointing.cpu_checkpointing)


def origin_of(config: Resolved, folder: Path, ready: Ready) -> Origin:
    """What checkpoints and exports say about the model and its data."""
    section = config.zerotop.model
    assert section.path is not None
    return Origin(
        path=section.path,
        folder=ready.folder,
        on_hub=not Path(folder, Path(section.path).expanduser()).exists(),
        revision=section.revision,
        complete=not section.new_tokens,
        tokenizer=ready.tokenizer,
        data=ready.reports,
    )


def _method(config: Resolved, device: torch.device) -> Method:
    """The method for zerotop.model.cross_entropy."""
    asked = config.zerotop.model.cross_entropy
    if asked in ("chunked", "whole"):
        return asked  # type: ignore[return-value]
    problem = liger_problem(device)
    if problem is None:
        return "liger"
    if asked == "liger":
        raise ConfigError(f'zerotop.model.cross_entropy: "liger" cannot be used: {problem}')
    return "chunked"


def _check_loss(engine: Engine, model: CausalLM, batches: Batches) -> None:
    """Compute the loss of a few tokens in both ways, and use the model's own logits if they differ. Collective."""
    if model.method == "whole":
        return
    tokens, targets, positions = (
        tensor[:1, :16].to(engine.device) for tensor in next(batches.micro_batches(engine.global_steps))
    )
    if not bool((targets >= 0).any()):
        targets = tokens.roll(-1, dims=1)
    engine.eval()
    agrees = model.agrees(tokens, targets, positions)
    engine.train()
    if not all(engine.comm.gather_objects(agrees)):
        model.method = "whole"
        if engine.comm.rank == 0:
            log.warning(
                f"{type(model.base).__name__} does something to its logits that zerotop does not know: the loss is "
                "computed from whole logits, which takes more memory"
            )


def run(engine: Engine, batches: Batches, evaluator: Evaluator, steps: int | None) -> None:
    """Run optimizer steps until `engine.global_steps` is `steps`; a resumed engine starts at its checkpoint's step.

    A step's loss is the mean over the trained tokens of its global batch: each micro-batch is divided by their number
    per micro-batch and rank, and the engine averages over these.
    """
    assert steps is not None  # resolve() fills it in where there is no script
    engine.train()
    engine.nonfinite.first_ends_run = True
    shares = engine.config.accumulation * engine.comm.world_size
    evaluator.before_first_step()
    for step in range(engine.global_steps, steps):
        denominator = max(1, batches.trained_tokens(step)) / shares
        for batch in batches.micro_batches(step):
            counted = int((batch.targets >= 0).sum())
            tokens, targets, positions = batch.to(engine.device)
            loss = engine(tokens, targets, positions, denominator, counted)
            engine.backward(loss)
            engine.step()
        evaluator.after_step(engine.global_steps, last=engine.global_steps == steps)
