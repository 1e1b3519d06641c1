"""Hugging Face models in the built-in trainer's wrapper train as plain torch does: same losses, same parameters.

The reference sees every document alone, without packing, on one process; its loss is the mean over all trained tokens.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from runtime.models.names import plain_name
from tests.numerics.training import HYPER, config

VOCAB, LENGTH, STEPS, WORLD, ACCUMULATION = 96, 24, 4, 2, 2
_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SMALL),
    "gemma2": ("gemma2", _SMALL | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _SMALL | {"head_dim": 8, "sliding_window": 8}),
    "granite": ("granite", _SMALL | {"logits_scaling": 4.0}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
                      "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}  # fmt: skip
"""Untied; tied with a soft cap and sliding windows; tied; with scaled logits; without rotary positions."""


@functools.cache
def saved(kind: str) -> Path:
    """A folder with the model, which is there as long as this module's tests."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, sizes = MODELS[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), attn_implementation="eager")
    folder = tempfile.TemporaryDirectory(prefix="zerotop-model-")
    _folders.append(folder)
    model.save_pretrained(folder.name)
    return Path(folder.name)


_folders: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def _no_folder_is_left() -> Iterator[None]:
    yield
    saved.cache_clear()
    while _folders:
        _folders.pop().cleanup()


def micro_batch(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two packed rows of two documents each; how many targets count differs from batch to batch."""
    draw = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(1, VOCAB, (2, LENGTH), generator=draw)
    counts = torch.rand(2, LENGTH, generator=draw) < (number + 1) / (WORLD * ACCUMULATION + 1)
    positions = torch.empty_like(tokens)
    targets = torch.full_like(tokens, -100)
    for row, edge in enumerate((9, 15)):
        for start, stop in ((0, edge), (edge, LENGTH)):
            positions[row, start:stop] = torch.arange(stop - start)
            targets[row, start : stop - 1] = tokens[row, start + 1 : stop]
    return tokens, targets.masked_fill(~counts, -100), positions


def documents(batch: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) of each document of a micro-batch."""
    found = []
    for tokens, targets, positions in zip(*batch, strict=True):
        edges = [*(positions == 0).nonzero().flatten().tolist(), LENGTH]
        found += [(tokens[a:b], targets[a:b]) for a, b in itertools.pairwise(edges)]
    return found


@functools.cache
def plain(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and parameters after them, of transformers and torch alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved(kind), attn_implementation="eager", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    losses = []
    for step in range(STEPS):
        batches = [micro_batch(step, number) for number in range(WORLD * ACCUMULATION)]
        counted = sum(int((targets >= 0).sum()) for _, targets, _ in batches)
        total = torch.zeros(())
        for tokens, targets in (pair for batch in batches for pair in documents(batch)):
            logits = model(tokens[None]).logits[0]
            total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        (total / counted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / counted)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(
    folder: str, stage: int, method: str, attention: str, checkpointing: bool = False, compiled: bool = False
) -> tuple[list[float], dict[str, Any]]:
    """On a rank: (global losses of the steps, all parameters by the model's names)."""
    import torch.distributed as dist

    from runtime.config import ModelConfig
    from runtime.engine.initialize import initialize
    from runtime.models import huggingface
    from runtime.models.causal_lm import CausalLM
    from runtime.zero.init import Init

    section = ModelConfig(path=folder, attention=attention)
    with Init(weights=folder):
        model = huggingface.build(huggingface.load_config(Path(folder), section), section)
        if checkpointing:
            huggingface.checkpoint_blocks(model)
        if compiled:
            huggingface.compile_blocks(model)
        wrapped = CausalLM(model, method)
    engine = initialize(model=wrapped, config=config(stage, ACCUMULATION, 1.0))[0]
    rank, losses = dist.get_rank(), []
    engine.train()
    for step in range(STEPS):
        counted = sum(int((micro_batch(step, number)[1] >= 0).sum()) for number in range(WORLD * ACCUMULATION))
        total = torch.zeros(1)
        for micro in range(ACCUMULATION):
            batch = micro_batch(step, micro * WORLD + rank)
            loss = engine(*batch, counted / (WORLD * ACCUMULATION))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (WORLD * ACCUMULATION)
        dist.all_reduce(total)
        losses.append(float(total))
    state = engine.module_state_dict()
    engine.destroy()
    return losses, {plain_name(name).removeprefix("model."): value.clone() for name, value in state.items()}


CASES = [
    pytest.param("llama", 3, "chunked", "sdpa", False),
    pytest.param("llama", 2, "whole", "sdpa", True),
    pytest.param("gemma2", 3, "chunked", "eager", False),
    pytest.param("granite", 1, "chunked", "sdpa", False),
    pytest.param("gpt2", 3, "chunked", "sdpa", False),
    *(
        pytest.param("gemma3", stage, "chunked", "sdpa", checkpointing, marks=() if stage == 3 else pytest.mark.slow)
        for stage in range(4)
        for checkpointing in (True, False)[: 1 if stage == 3 else 2]
    ),
]


@pytest.mark.parametrize(("kind", "stage", "method", "attention", "checkpointing"), CASES)
def test_parity_with_plain_torch(
    ranks: Any, kind: str, stage: int, method: str, attention: str, checkpointing: bool
) -> None:
    pytest.importorskip("transformers")
    losses, expected = plain(kind)
    outcomes = ranks(WORLD).run(trained, str(saved(kind)), stage, method, attention, checkpointing)
    for found, values in outcomes:
        assert found == pytest.approx(losses, rel=1e-5)
        assert values.keys() >= expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


INDUCTOR = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")


@pytest.mark.parametrize(
    ("stage", "backend"),
    [
        pytest.param(2, "aot_eager", marks=pytest.mark.slow),
        pytest.param(3, "aot_eager"),
        pytest.param(2, "inductor", marks=(INDUCTOR, pytest.mark.slow, pytest.mark.timeout(600))),
        pytest.param(3, "inductor", marks=(INDUCTOR, pytest.mark.slow, pytest.mark.timeout(600))),
    ],
)
def test_compiled_blocks_train_as_eager_ones(ranks: Any, stage: int, backend: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    group, folder = ranks(WORLD), str(saved("llama"))
    (losses, expected), _ = group.run(trained, folder, stage, "chunked", "sdpa")
    outcomes = group.run(compiled, folder, stage, backend, str(tmp_path), timeout_s=300)
    for found, values in outcomes:
        assert found == pytest.approx(losses, rel=1e-5)
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def compiled(folder: str, stage: int, backend: str, cache: str) -> tuple[list[float], dict[str, Any]]:
    """On a rank: as `trained`, with zerotop.model.compile and this backend of torch.compile."""
    compiler = functools.partial(torch.compile, backend=backend)
    with (
        mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}),
        mock.patch("runtime.models.huggingface.torch.compile", compiler),
    ):
        torch._dynamo.reset()  # of the same code compiled before
        torch._dynamo.utils.counters.clear()
        outcome = trained(folder, stage, "chunked", "sdpa", compiled=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    return outcome


def grown(folder: str, stage: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """On a rank: embedding and head of a model with a larger vocabulary than in its files."""
    from runtime.config import ModelConfig
    from runtime.engine.initialize import initialize
    from runtime.models import huggingface
    from runtime.zero.init import Init

    section = ModelConfig(path=folder)
    with Init(weights=folder):
        model = huggingface.build(huggingface.load_config(Path(folder), section), section)
        huggingface.grow_vocabulary(model, VOCAB + 3)
    engine = initialize(model=model, config=config(stage, 1, 1.0))[0]
    engine.backward(engine(input_ids=torch.full((1, 4), VOCAB + 2)).logits.mean())  # the new rows can be looked up
    engine.step()
    engine.destroy()
    with Init(weights=folder):
        model = huggingface.build(huggingface.load_config(Path(folder), section), section)
        huggingface.grow_vocabulary(model, VOCAB + 3)
    engine = initialize(model=model, config=config(stage, 1, 1.0))[0]
    state = engine.module_state_dict()
    engine.destroy()
    return state["model.embed_tokens.weight"].clone(), state["lm_head.weight"].clone(), model.config.vocab_size


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_new_tokens_begin_as_the_mean_of_the_old(ranks: Any, kind: str) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    old = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32)
    for embedding, head, size in ranks(WORLD).run(grown, str(saved(kind)), 3):
        assert size == len(embedding) == len(head) == 128  # a multiple of 64
        for found, weight in ((embedding, old.model.embed_tokens.weight), (head, old.lm_head.weight)):
            assert torch.equal(found[:VOCAB], weight)
            mean = weight.detach().double().mean(0).float()
            torch.testing.assert_close(found[VOCAB:], mean.expand(128 - VOCAB, -1))
