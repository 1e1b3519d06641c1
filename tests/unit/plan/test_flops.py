"""FLOPs per token by formula, compared with what torch's counter sees in forward and backward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from runtime.config import load
from runtime.config.presets import PRESETS, GPTConfig
from runtime.models.gpt import GPT
from runtime.plan.flops import FlopsPerToken, flops_per_token, gpt_weights
from runtime.plan.pretrained import pretrained
from runtime.plan.workload import built_in_workload, pretrained_workload
from tests.harness import huggingface

TOKENS, ROWS = 64, 2
SHAPE = GPTConfig(layers=3, heads=4, dim=64, vocab_size=128, max_seq_len=TOKENS)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def counted(model: nn.Module, call: Any) -> float:
    """FLOPs per token of forward and backward. The plain backend of attention: the counter does not know the fused
    kernels of the CPU."""
    tokens = torch.randint(0, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(model, tokens).backward()
    return counter.get_total_flops() / tokens.numel()


def gpt_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    loss = model(tokens, tokens)
    assert isinstance(loss, torch.Tensor)
    return loss


def hugging_face_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert isinstance(loss, torch.Tensor)
    return loss


@pytest.mark.parametrize("tied", [False, True])
def test_built_in_gpt(tied: bool) -> None:
    shape = dataclasses.replace(SHAPE, tied=tied)
    formula = flops_per_token(shape, gpt_weights(shape), TOKENS)
    assert formula.model == pytest.approx(counted(GPT(shape), gpt_loss), rel=0.01)
    assert formula.hardware == formula.model


def test_recomputation_counts_for_the_hardware_only() -> None:
    plain = flops_per_token(SHAPE, gpt_weights(SHAPE), TOKENS)
    formula = flops_per_token(SHAPE, gpt_weights(SHAPE), TOKENS, recomputed=True)
    assert formula.model == plain.model
    model = GPT(SHAPE)
    model.checkpoint_activations()
    with set_checkpoint_early_stop(False):
        assert formula.hardware == pytest.approx(counted(model, gpt_loss), rel=0.01)
    assert formula.model < counted(model, gpt_loss) < formula.hardware


def planned(folder: str, **section: Any) -> FlopsPerToken:
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zerotop": {"model": {"path": folder}, "data": {"files": ["x.jsonl"], "seq_len": TOKENS}, **section},
    }
    resolved = load(config).resolve(1, "cpu")
    found = pretrained_workload(resolved, pretrained(resolved, Path(folder))).flops_per_token
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral", "qwen3-moe"])
def test_hugging_face_models(kind: str, tmp_path: Path) -> None:
    folder = huggingface.save(kind, tmp_path)
    model = huggingface.build(kind, attn_implementation="eager", experts_implementation="eager")
    assert planned(folder).model == pytest.approx(counted(model, hugging_face_loss), rel=0.02)


@pytest.mark.parametrize("saved", [[], ["lm_head"]], ids=["", "trained head"])
def test_frozen_weights_have_no_gradient_of_their_own(saved: list[str], tmp_path: Path) -> None:
    """The formula counts the gradient of every weight's input. The first block's has none here, since the embedding is
    frozen: a few tenths of a per cent of 16 blocks."""
    from runtime.models.lora import add_adapters

    changes = {"num_hidden_layers": 16}
    folder = huggingface.save("llama", tmp_path, **changes)
    lora = {"r": 4, "modules_to_save": saved}
    section = load({"zerotop": {"model": {"path": folder}, "data": {"files": ["x.jsonl"]}, "lora": lora}})
    config = section.resolve(1, "cpu").zerotop.lora
    assert config is not None
    model = add_adapters(huggingface.build("llama", attn_implementation="eager", **changes), config)
    formula = planned(folder, lora=lora)
    assert formula.model == pytest.approx(counted(model, hugging_face_loss), rel=0.01)
    assert formula.model < planned(folder).model


def test_the_seven_billion_preset_by_hand() -> None:
    """6 N + 12 L H Q T with N = 32 x 12 x 4096^2 + 50304 x 4096 and T = 2048."""
    shape = PRESETS["gpt-7b"]
    expected = 6 * (32 * 12 * 4096**2 + 50304 * 4096) + 12 * 32 * 4096 * 2048
    assert flops_per_token(shape, gpt_weights(shape), 2048).model == expected


def test_workload_of_a_config() -> None:
    resolved = load(
        {
            "train_micro_batch_size_per_gpu": 1,
            "activation_checkpointing": {"partition_activations": False},
            "zerotop": {"model": {"preset": "gpt-tiny"}, "data": {"seq_len": 128}},
        }
    ).resolve(1, "cpu")
    workload = built_in_workload(resolved, Path.cwd())
    assert workload is not None and workload.flops_per_token is not None
    shape = dataclasses.replace(PRESETS["gpt-tiny"], max_seq_len=128)
    assert workload.flops_per_token.model == flops_per_token(shape, gpt_weights(shape), 128).model
    assert workload.flops_per_token.hardware > workload.flops_per_token.model
    assert dataclasses.replace(workload, shape=None).flops_per_token is None
