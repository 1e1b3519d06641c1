"""One rank of an arm of compare.py: trains on the same packed sequences as every other arm, and writes a record.

Arms: `zt0` to `zt3` and `zt0_offload` to `zt3_offload` are zerotop's trainer; `trainer` is transformers.Trainer on one
process; `ds2`, `ds3` are transformers.Trainer with DeepSpeed. All train the same global batches in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--arm", "--model", "--data", "--out", "--ready"):
        parser.add_argument(name, required=True)
    for name in ("--steps", "--seq-len", "--micro-batch", "--global-batch"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--packing", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.basicConfig(level=logging.WARNING)
    config = settings(options)
    record = (train_zerotop if options.arm.startswith("zt") else train_transformers)(options, config)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(options.out).write_text(json.dumps(record))
    os._exit(0)  # without the libraries' farewells


def settings(options: argparse.Namespace) -> Any:
    """The resolved config of zerotop's arms; the others take model and data from it."""
    from runtime.config import load

    world = int(os.environ.get("WORLD_SIZE", "1"))
    arm, _, offload = options.arm.partition("_")
    zero: dict[str, Any] = {"stage": int(arm[2]) if arm.startswith("zt") else 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu"}
    return load(
        {
            "train_micro_batch_size_per_gpu": options.micro_batch,
            "gradient_accumulation_steps": options.global_batch // (options.micro_batch * world),
            "gradient_clipping": CLIP,
            "zero_optimization": zero,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": options.lr, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY},
            },
            "zerotop": {
                "model": {"path": options.model},
                "data": {"files": [options.data], "seq_len": options.seq_len, "packing": bool(options.packing)},
                "train": {"steps": options.steps},
            },
        }
    ).resolve(world, "cpu")


def say_ready(options: argparse.Namespace, model_config: Any) -> None:
    """Import what builds the model: all that comes now is its loading. The parent takes its baseline of the memory."""
    from transformers import AutoModelForCausalLM

    if options.ready is None:  # nobody measures
        return
    assert AutoModelForCausalLM._model_mapping[type(model_config)]  # imports the model's file, and most of transformers
    Path(f"{options.ready}-{os.environ.get('RANK', '0')}").touch()
    while not Path(f"{options.ready}-go").exists():
        time.sleep(0.02)


# ---- zerotop ---------------------------------------------------------------------------------------------------------
def train_zerotop(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    from runtime.comm import init_distributed
    from runtime.engine.initialize import initialize
    from runtime.models.causal_lm import CausalLM
    from runtime.trainer.build import build_model
    from runtime.trainer.prepare import prepare
    from runtime.zero.init import Init

    init_distributed()
    ready = prepare(config.zerotop, Path("/"), lambda line: None)
    say_ready(options, ready.config)
    began = time.perf_counter()
    with Init(weights=ready.folder):
        model = CausalLM(build_model(config, ready.config, len(ready.tokenizer)), "chunked")
    engine = initialize(model=model, config=config)[0]
    loaded = time.perf_counter() - began
    batches = ready.data.batches(config.micro_batch, config.accumulation, dist.get_rank(), dist.get_world_size())
    engine.train()
    shares = config.accumulation * dist.get_world_size()
    losses, seconds, tokens = [], [], []
    for step in range(options.steps):
        began = time.perf_counter()
        denominator = batches.trained_tokens(step) / shares
        total, count = torch.zeros(1), torch.zeros(1)
        for batch in batches.micro_batches(step):
            loss = engine(*batch, denominator)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / shares
            count += batch.tokens.numel()
        seconds.append(time.perf_counter() - began)
        dist.all_reduce(total)
        dist.all_reduce(count)
        losses.append(total.item())
        tokens.append(count.item())
    engine.destroy()
    batches.close()
    return {"losses": losses, "seconds": seconds, "tokens": tokens, "load_s": loaded}


# ---- transformers.Trainer --------------------------------------------------------------------------------------------
class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The sequences in the order in which zerotop trains them, as transformers wants them: labels not shifted."""

    def __init__(self, sequences: Any, order: Any, count: int) -> None:
        self.sequences, self.order, self.count = sequences, order, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, targets, positions = self.sequences.batch([self.order.window(index)])
        labels = targets.roll(1, dims=1)
        labels[:, 0] = -100
        return {"input_ids": tokens[0], "labels": labels[0], "position_ids": positions[0]}


def train_transformers(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from runtime.data.conversations.batches import TrainingBatches
    from runtime.trainer.prepare import prepare

    world = int(os.environ.get("WORLD_SIZE", "1"))
    ready = prepare(config.zerotop, Path("/"), lambda line: None)
    batches = ready.data.batches(options.global_batch, 1, 0, 1)
    assert isinstance(batches, TrainingBatches)
    rows = Rows(batches.sequences, batches.order, options.steps * options.global_batch)
    arguments = TrainingArguments(
        output_dir=f"{options.out}.trainer",
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.global_batch // (options.micro_batch * world),
        max_steps=options.steps,
        learning_rate=options.lr,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        optim="adamw_torch",
        deepspeed=_deepspeed(int(options.arm[2])) if options.arm.startswith("ds") else None,
    )
    losses: list[float] = []
    ends: list[float] = []
    loaded: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_named: Any) -> None:
            loaded.append(time.perf_counter() - began)  # the engine is there: with DeepSpeed, or the model wrapped

        def on_step_begin(self, *_args: Any, **_named: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_args: Any, **_named: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *_args: Any, logs: dict[str, float] | None = None, **_named: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        """Takes the rows as they come, and decays every parameter, as zerotop's arms do."""

        def _get_train_sampler(self, *_args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    say_ready(options, ready.config)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(ready.folder, dtype=torch.float32)
    InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Watch()]).train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    batches.close()
    tokens = [
        sum(rows[step * options.global_batch + at]["input_ids"].numel() for at in range(options.global_batch))
        for step in range(options.steps)
    ]
    return {"losses": losses, "seconds": seconds, "tokens": tokens, "load_s": loaded[0]}


def _deepspeed(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }


if __name__ == "__main__":
    main()
