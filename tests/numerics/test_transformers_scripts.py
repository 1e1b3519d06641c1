"""What scripts do with models of transformers and peft, on two ranks: building them under zero.Init, checkpointing of
activations, generate() between steps, tied weights and adapters. All against plain torch, in few calls, because each
rank has to import transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import runtime as deepspeed
from runtime.engine.initialize import initialize
from tests.harness import huggingface
from tests.numerics.training import HYPER, assert_equal, config

STEPS = 3


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = torch.randint(huggingface.VOCABULARY, (2, 9), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def train_plainly(model: Any) -> dict[str, torch.Tensor]:
    """Both ranks' batches in one process."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(trained, **HYPER)
    for step in range(STEPS):
        for rank in range(2):
            (model(**batch(step, rank)).loss / 2).backward()
        update.step()
        update.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train(engine: Any) -> dict[str, torch.Tensor]:
    for step in range(STEPS):
        engine.backward(engine(**batch(step, dist.get_rank())).loss)
        engine.step()
    whole = engine.module.state_dict()
    return {name: whole[name].clone() for name, _ in engine.module.named_parameters()}


def engine_of(model: Any, stage: int) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return initialize(model=model, model_parameters=trained, config=config(stage, 1, clip=0.0))[0]


# ---- building -------------------------------------------------------------------------------------------------------
def build_under_init(folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    rank = dist.get_rank()
    for kind in ("qwen3", "gemma3", "mixtral", "deepseek-v3"):
        path = f"{folder}/{kind}"
        for weights in (None, path):
            with deepspeed.zero.Init(weights=weights):
                model = AutoModelForCausalLM.from_pretrained(path)
            assert all(parameter.is_meta == (rank != 0 or weights is not None) for parameter in model.parameters())
            check(model, AutoModelForCausalLM.from_pretrained(path))
        torch.manual_seed(5)
        with deepspeed.zero.Init():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        torch.manual_seed(5)
        check(model, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))


def check(model: Any, plain: Any) -> None:
    """The model becomes one of stage 3 with the plain one's values, and computes the same."""
    engine = engine_of(model, 3)
    found, expected = engine.module.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    inputs = batch(0, dist.get_rank())["input_ids"]
    with torch.no_grad():
        logits = engine.eval()(inputs).logits
        assert torch.equal(logits, plain.eval()(inputs).logits)  # with the tables of positions, which no file has


def test_from_pretrained_and_from_config_work_under_init(ranks, tmp_path: Path):
    for kind in ("qwen3", "gemma3", "mixtral", "deepseek-v3"):
        huggingface.save(kind, tmp_path / kind)
    ranks(2).run(build_under_init, str(tmp_path), timeout_s=180)


# ---- training -------------------------------------------------------------------------------------------------------
def train_each() -> list[str]:
    """Each case is a way to make a model and the stages at which it is trained."""
    from peft import LoraConfig, get_peft_model

    def checkpointed(kind: str, reentrant: bool) -> Any:
        model = huggingface.build(kind).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    def adapted(checkpointing: bool) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(huggingface.build("qwen3"), LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they begin as zero, with which the gradients of the others are zero, too
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        return model.train()

    cases: dict[str, tuple[Any, tuple[int, ...]]] = {
        "tied": (lambda: huggingface.build("qwen3").train(), (0, 1, 2, 3)),
        "own table of positions": (lambda: huggingface.build("gpt2", **NO_DROPOUT).train(), (0, 3)),
        "sliding window": (lambda: huggingface.build("gemma3").train(), (3,)),
        "checkpointed": (lambda: checkpointed("llama", False), (2, 3)),
        "checkpointed, reentrant": (lambda: checkpointed("llama", True), (2, 3)),
        "experts checkpointed": (lambda: checkpointed("mixtral", False), (3,)),
        "experts checkpointed, reentrant": (lambda: checkpointed("mixtral", True), (3,)),
        "adapters": (lambda: adapted(False), (0, 2, 3)),
        "adapters checkpointed": (lambda: adapted(True), (3,)),
    }
    done = []
    for name, (make, stages) in cases.items():
        expected = train_plainly(make())
        for stage in stages:
            engine = engine_of(make(), stage)
            try:
                assert_equal(train(engine), expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, stage {stage}: {error}") from None
            engine.destroy()
            done.append(f"{name}/{stage}")
    return done


NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def test_scripts_train_as_in_plain_torch(ranks):
    assert len(ranks(2).run(train_each, timeout_s=240)[0]) == 17


# ---- generating -----------------------------------------------------------------------------------------------------
def generate_between_steps() -> None:
    rank = dist.get_rank()
    prompt = torch.randint(64, (2, 5 + 3 * rank), generator=torch.Generator().manual_seed(rank))
    for kind in ("llama", "gemma3", "mixtral"):
        model = huggingface.build(kind)
        plain = copy.deepcopy(model)
        engine = engine_of(model, 3)
        for step in range(2):
            for settings in (
                {"max_new_tokens": 4 + 5 * rank},  # one rank goes on when the other has finished
                {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2},
                {"max_new_tokens": 3, "use_cache": False, "synced_gpus": True},
            ):
                found = engine.module.eval().generate(prompt, do_sample=False, **settings)
                settings.pop("synced_gpus", None)
                assert torch.equal(found, plain.eval().generate(prompt, do_sample=False, **settings)), (kind, settings)
            engine.module.train()
            engine.backward(engine(**batch(step, rank)).loss)
            engine.step()
            plain.load_state_dict(engine.module.state_dict())
        engine.destroy()
        if rank == 0:  # the model is this rank's alone again
            assert model.eval().generate(prompt, do_sample=False, max_new_tokens=3).shape == (2, 8)


def test_generate_between_steps_at_stage_3_gives_what_the_unsharded_model_gives(ranks):
    ranks(2).run(generate_between_steps, timeout_s=180)
