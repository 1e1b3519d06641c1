"""From checkpoints of fine-tuned Hugging Face models to folders: what from_pretrained() loads gives the logits of the
model in training, to the last bit; adapters alone and merged; tokenizer, chat template and model card; nothing private.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoint.format.manifest import CheckpointError, read_manifest
from runtime.config.finetune import LoraConfig
from runtime.wire.finetuning import DataReport, Evaluation
from tests.harness.packages import needs
from tests.numerics.test_lora import advance, built, engine_of, state_of
from tests.numerics.tiny_models import TEMPLATE, Trained, batch, save_model, save_tokenizer
from tests.numerics.training import message_of
from zerotop.cli import main

needs("peft")
here = pytest.mark.usefixtures("export_here")


def export(*words: object) -> Path:
    assert main(["export", *map(str, words)]) == 0
    return Path(str(words[1]))


def tokens() -> torch.Tensor:
    return torch.cat([batch(77, sample) for sample in range(2)])


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def loaded(folder: Path) -> torch.Tensor:
    """Logits of what from_pretrained() makes of an exported folder, which must lack nothing."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return logits_of(model.eval())


def origin_of(folder: Path, base: str = "base") -> Any:
    from transformers import AutoTokenizer

    from runtime.models.origin import Origin

    report = DataReport(
        role="train", files=["/home/somebody/secret/chats.jsonl", "hf://datasets/org/dialogues"], format="messages",
        train_on="assistant", rows=1200, samples=1100, tokens=5000, trained_tokens=2000, seq_len=64, sequences=90,
        dropped={"no assistant turn": 100},
    )  # fmt: skip
    return Origin(
        path=str(folder), folder=folder, tokenizer=AutoTokenizer.from_pretrained(folder), data=[report],
        evaluations=[Evaluation(rank=0, step=2, loss=2.5, tokens=10, samples=3, best=True, wall_s=1.0)],
    )  # fmt: skip


# ---- full fine-tuning ------------------------------------------------------------------------------------------------
def finetune(folder: str, out: str, stage: int, precision: str) -> torch.Tensor:
    """Train a model of from_pretrained() under zero.Init and save it; its logits."""
    from transformers import AutoModelForCausalLM

    from runtime.zero.init import Init

    with Init():
        model = Trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model.origin = origin_of(Path(folder))
    engine = engine_of(model, stage, precision)
    advance(engine, 2)
    engine.save_checkpoint(out, "c")
    engine.eval()
    return logits_of(engine.module.model)


KINDS = [("llama", 3, "bf16"), ("qwen3", 1, "bf16"), ("gemma3", 3, "fp32"), ("gpt2", 2, "bf16"), ("mixtral", 3, "bf16")]


@here
@pytest.mark.parametrize(("kind", "stage", "precision"), [*KINDS, ("qwen3-moe", 0, "fp32")])
def test_logits_are_those_of_the_model_in_training(ranks, tmp_path, kind, stage, precision):
    base = tmp_path / "base"
    save_model(kind, base)
    save_tokenizer(base)
    logits = ranks(2).run(finetune, str(base), str(tmp_path), stage, precision)[0]
    out = export(tmp_path / "c", tmp_path / "out", "--shard-size", "40KiB")
    found = loaded(out)
    assert found.dtype == logits.dtype and torch.equal(found, logits)
    written = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert written == set(load_file(base / "model.safetensors"))  # also the experts, one by one


# ---- adapters --------------------------------------------------------------------------------------------------------
LORA = {"r": 4, "alpha": 8, "rslora": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LORA | {"modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"r": 4, "alpha": 8}),
    "tied": ("tied", LORA | {"modules_to_save": ["embed_tokens"]}),
    "embedding": ("llama", LORA | {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
}


def adapt(folder: str, out: str, lora: dict[str, Any], precision: str) -> torch.Tensor:
    """Train adapters and save them with the base model and, as a run does by itself, without it; the logits."""
    model = built(folder, lora)
    model.origin = origin_of(Path(folder))
    engine = engine_of(model, 3, precision)
    advance(engine, 3)
    engine.save_checkpoint(out, "whole")
    engine.checkpointer.begin(Path(out), "alone", {})
    engine.wait_for_checkpoint()
    engine.eval()
    return logits_of(engine.module.model)


def merged_by_peft(base: Path, adapters: Path) -> torch.Tensor:
    import peft
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters)
    return logits_of(model.merge_and_unload().eval())


@here
@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_alone_and_merged(ranks, tmp_path, variant):
    import peft
    from transformers import AutoModelForCausalLM

    kind, lora = VARIANTS[variant]
    base = tmp_path / "base"
    save_model(kind, base)
    save_tokenizer(base)
    logits = ranks(2).run(adapt, str(base), str(tmp_path), lora, "fp32")[0]
    sizes = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.distcp")) for name in ("whole", "alone")}
    assert sizes["alone"] < sizes["whole"]
    adapters = export(tmp_path / "alone", tmp_path / "adapters")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters)
    assert torch.equal(logits_of(model.eval()), logits)
    merged = export(tmp_path / "alone", tmp_path / "merged", "--merge", "--shard-size", "40KiB")
    found = loaded(merged)
    torch.testing.assert_close(found, merged_by_peft(base, adapters), rtol=0, atol=2e-6)
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)
    whole = export(tmp_path / "whole", tmp_path / "from-whole", "--merge", "--base", base)
    assert torch.equal(loaded(whole), found)
    rounded = export(tmp_path / "alone", tmp_path / "bf16", "--merge", "--dtype", "bf16")
    exact, coarse = (
        {k: v for f in sorted(o.glob("*.safetensors")) for k, v in load_file(f).items()} for o in (merged, rounded)
    )
    assert exact.keys() == coarse.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(exact[name].bfloat16(), coarse[name]) for name in exact)  # rounded once
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"


def adapt_experts(folder: str, out: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from runtime.models.lora import add_adapters
    from runtime.zero.init import Init

    with Init():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = Trained(add_adapters(model, LoraConfig(r=2, target_modules=("q_proj", "gate_up_proj", "down_proj"))))
    engine = engine_of(model, 3)
    advance(engine, 2)
    engine.save_checkpoint(out, "c")
    engine.eval()
    return logits_of(engine.module.model)


@here
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapters_of_fused_experts_are_what_peft_reads_and_are_not_merged(ranks, tmp_path, capfd):
    import peft
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    save_model("mixtral", base)
    logits = ranks(2).run(adapt_experts, str(base), str(tmp_path))[0]
    out = export(tmp_path / "c", tmp_path / "out")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    torch.testing.assert_close(logits_of(model.eval()), logits, rtol=0, atol=1e-6)
    capfd.readouterr()
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "merged"), "--merge"]) == 2
    assert "adapts a parameter of several experts" in capfd.readouterr().err


# ---- what comes along ------------------------------------------------------------------------------------------------
def save_both(folder: str, out: str) -> None:
    for name, lora in (("full", None), ("lora", LORA)):
        model = built(folder, lora)
        model.origin = origin_of(Path(folder))
        engine = engine_of(model, 2)
        advance(engine, 2)
        engine.checkpointer.begin(Path(out), name, {})
        engine.wait_for_checkpoint()


@here
def test_tokenizer_template_and_card_come_along_and_nothing_private(ranks, tmp_path, capfd):
    from transformers import AutoTokenizer

    base = tmp_path / "tiny-base"
    save_model("llama", base)
    save_tokenizer(base)
    ranks(2).run(save_both, str(base), str(tmp_path))
    outs = {
        "full": export(tmp_path / "full", tmp_path / "out-full"),
        "adapters": export(tmp_path / "lora", tmp_path / "out-lora"),
        "merged": export(tmp_path / "lora", tmp_path / "out-merged", "--merge"),
    }
    for kind, out in outs.items():
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == TEMPLATE and (out / "chat_template.jinja").read_text() == TEMPLATE
        for file in (*out.glob("*.json"), *out.glob("*.md")):
            text = file.read_text()
            assert str(tmp_path) not in text and "/home/somebody" not in text and "secret" not in text, file
        card = (out / "README.md").read_text()
        head, _, body = card.removeprefix("---\n").partition("\n---\n")
        assert 'datasets:\n- "org/dialogues"' in head and "- zerotop" in head
        assert ("- lora" in head) == (kind != "full") and ("library_name: peft" in head) == (kind == "adapters")
        assert "`tiny-base`, trained for 2 steps" in body
        assert (
            "| train | `chats.jsonl`, `hf://datasets/org/dialogues` | messages | 1,200 | 1,100 | 5,000 | 2,000 |"
            in body
        )
        assert "100 rows left out" in body and "| 2 | 2.5000 (best) |" in body and "Training loss at the end: " in body
        assert "AdamW: lr 0.001" in body
        assert (out / "generation_config.json").exists() == (kind != "adapters")
    adapters = json.loads((outs["adapters"] / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == "tiny-base"
    base.rename(tmp_path / "moved")
    capfd.readouterr()
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "o"), "--merge"]) == 2
    assert "give their folder with --base" in capfd.readouterr().err
    export(tmp_path / "lora", tmp_path / "o", "--merge", "--base", tmp_path / "moved")
    capfd.readouterr()
    for words, message in [
        (["full", "p", "--merge"], "has no adapters; export it without --merge"),
        (["lora", "p", "--base", str(tmp_path / "moved")], "--base: it is only read with --merge"),
        (["lora", "p", "--merge", "--base", str(tmp_path / "none")], "--base: there is no folder"),
    ]:
        assert main(["export", str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]]) == 2
        assert message in capfd.readouterr().err
    other = tmp_path / "other"
    save_model("gpt2", other)
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "p"), "--merge", "--base", str(other)]) == 2
    assert "do not fit the checkpoint" in capfd.readouterr().err


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def resume(folder: str, out: str) -> dict[str, Any]:
    engines = []
    for _ in range(2):
        model = built(folder, LORA)
        model.origin = origin_of(Path(folder))
        engines.append(engine_of(model, 3))
    first, second = engines
    advance(first, 2)
    first.checkpointer.begin(Path(out), "c", {})
    first.wait_for_checkpoint()
    advance(first, 2)
    second.load_checkpoint(out, "c")
    advance(second, 2)
    mine, other = state_of(first), state_of(second)
    adapter = next(p for name, p in second.module.named_parameters() if "lora_A" in name)
    from runtime.zero import GatheredParameters

    with GatheredParameters([adapter], modifier_rank=0):
        adapter.data[0, 0] = torch.nan
    refused = message_of(CheckpointError, lambda: second.save_checkpoint(out, "nan"))
    return {"same": all(torch.equal(mine[name], other[name]) for name in mine), "refused": refused}


def test_a_run_saves_adapters_alone_resumes_from_the_base_models_files_and_refuses_nan(ranks, tmp_path, caplog):
    base = tmp_path / "base"
    save_model("llama", base)
    save_tokenizer(base)
    for found in ranks(2).run(resume, str(base), str(tmp_path)):
        assert found["same"]
        assert "holds NaN: the checkpoint would be of no use" in found["refused"]
    manifest = read_manifest(tmp_path / "c")
    assert manifest.excluded and all("lora_" not in name for name in manifest.excluded)
    assert not (tmp_path / "nan").exists()
