"""peft's adapters around Hugging Face models, in the engine: as plain peft trains them, at every stage and world size;
frozen weights cost nothing but their shard; checkpoints of adapters alone; exports that peft and transformers read."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.config import ConfigError
from runtime.config.finetune import LoraConfig
from tests.harness.packages import needs
from tests.numerics.tiny_models import Trained, batch, loss_of, save_model
from tests.numerics.training import HYPER, assert_equal, config, message_of

needs("peft")
STEPS = 6


def built(folder: str, lora: dict[str, Any] | None, checkpointing: bool = False) -> Trained:
    """The model of `folder` under zero.Init, as the trainer builds it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from runtime.models.lora import add_adapters
    from runtime.zero.init import Init

    with Init(weights=folder):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora is not None:
            model = add_adapters(model, LoraConfig(**lora))
        return Trained(model)


def engine_of(model: Any, stage: int, precision: str = "fp32") -> Any:
    from runtime.engine.initialize import initialize

    return initialize(model=model, config=config(stage, 1, 1.0, precision))[0]


def advance(engine: Any, steps: int, world: int = 2) -> None:
    """Every step trains on the same four samples at every world size."""
    rank, share = dist.get_rank(), 4 // dist.get_world_size()
    for step in range(engine.global_steps, engine.global_steps + steps):
        samples = range(rank * share, (rank + 1) * share)
        engine.backward(engine(torch.cat([batch(step, sample) for sample in samples])))
        engine.step()


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def train(folder: str, lora: dict[str, Any], stage: int, checkpointing: bool) -> tuple[Any, Any, dict[str, int]]:
    torch.manual_seed(3)
    engine = engine_of(built(folder, lora, checkpointing), stage)
    first = state_of(engine)
    advance(engine, STEPS)
    return first, state_of(engine), dict(engine.state.ledger.peaks())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`folder_of(kind)`: a folder with the model."""

    @functools.cache
    def of(kind: str) -> str:
        folder = str(tmp_path_factory.mktemp(kind))
        save_model(kind, folder)
        return folder

    return of


def plainly(folder: str, lora: LoraConfig, first: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain peft and torch, one process; adapters start as in `first`."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    saved = list(lora.modules_to_save) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about GPT-2's Conv1D and transformers' new names
        wrapped = Trained(
            peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=lora.r, lora_alpha=lora.alpha, target_modules=targets, use_rslora=lora.rslora,
                    modules_to_save=saved, task_type="CAUSAL_LM",
                ),
            )
        )  # fmt: skip
    whole = wrapped.state_dict()
    assert whole.keys() == first.keys()
    for name, value in first.items():
        if "lora_" not in name:  # the base model is that of the files
            assert torch.equal(whole[name], value), name
    wrapped.load_state_dict(first)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(trained, **HYPER)
    for step in range(STEPS):
        loss_of(wrapped.model, torch.cat([batch(step, sample) for sample in range(4)])).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad()
    return {name: value.detach() for name, value in wrapped.state_dict().items()}


CASES = {
    "llama": ("llama", {"r": 4, "alpha": 8}),
    "head": ("llama", {"r": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"r": 4, "alpha": 8, "rslora": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
}


@pytest.mark.parametrize(
    ("case", "stage", "checkpointing"),
    [
        ("llama", 0, False), ("llama", 1, True), ("llama", 2, False), ("llama", 3, True), ("gpt2", 3, False),
        pytest.param("gpt2", 2, True, marks=pytest.mark.slow), pytest.param("head", 3, False, marks=pytest.mark.slow),
        ("head", 1, False),
    ],
)  # fmt: skip
def test_as_plain_peft_trains_them_and_frozen_weights_hold_no_states(ranks, folder_of, case, stage, checkpointing):
    kind, lora = CASES[case]
    folder = folder_of(kind)
    first, last, peaks = ranks(2).run(train, folder, lora, stage, checkpointing)[0]
    alone, _, _ = ranks(1).run(train, folder, lora, stage, checkpointing)[0]
    assert_equal(first, alone, tolerance=0.0)  # adapters begin alike at every world size
    assert_equal(last, plainly(folder, LoraConfig(**lora), first))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if "lora_" in name or "modules_to_save" in name}
    sizes = {name: value.numel() * 4 for name, value in first.items()}
    trained, frozen = sum(sizes[name] for name in moved), sum(sizes.values()) - sum(sizes[name] for name in moved)
    share = 1 if stage == 0 else 2
    slack = 2 * 64 * 4 * 4 * 8  # units are padded to 64 elements per rank
    assert 2 * trained / share <= peaks["optimizer"] <= 2 * trained / share + slack
    assert peaks["gradients"] <= trained + slack
    if stage == 3:
        assert peaks["parameters"] < 0.9 * (frozen + trained)


def misuse(folder: str) -> dict[str, str]:
    cases = {
        "porj": {"target_modules": ["q_proj", "q_porj"]},
        "head": {"modules_to_save": ["lm_haed"]},
    }
    return {name: message_of(ConfigError, lambda given=given: built(folder, given)) for name, given in cases.items()}


def test_a_name_that_matches_nothing_is_an_error_with_the_nearest_names(ranks, folder_of):
    found = ranks(1).run(misuse, folder_of("llama"))[0]
    assert found["porj"].startswith(
        "zerotop.lora.target_modules: LlamaForCausalLM has no linear module named 'q_porj': expected some of q_proj, "
    )
    assert found["head"].startswith(
        "zerotop.lora.modules_to_save: LlamaForCausalLM has no module with parameters named 'lm_haed': expected some "
        "of lm_head, "
    )


def tied(folder: str) -> tuple[str, dict[str, torch.Tensor]]:
    refused = message_of(ConfigError, lambda: built(folder, {"target_modules": ["q_proj", "embed_tokens"]}))
    engine = engine_of(built(folder, {"modules_to_save": ["embed_tokens"], "r": 2}), 3)
    advance(engine, 2)
    return refused, state_of(engine)


def test_tied_embeddings_are_trained_as_one_or_not_at_all(ranks, folder_of):
    refused, state = ranks(2).run(tied, folder_of("tied"))[0]
    assert "model.embed_tokens shares its weight with another module" in refused
    inner = "model.base_model.model."
    trained = state[f"{inner}model.embed_tokens.modules_to_save.default.weight"]
    assert torch.equal(trained, state[f"{inner}lm_head.modules_to_save.default.weight"])
    assert not torch.equal(trained, state[f"{inner}model.embed_tokens.original_module.weight"])
