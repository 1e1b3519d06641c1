"""From the file to what a run trains with: precision, optimizer, scheduler, "auto", notes, digest."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime.config
from runtime.config import (
    ConfigError,
    OptimizerConfig,
    Resolved,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    load,
)
from tests.harness.waiting import patient


def resolve(config: dict[str, Any], device: Any = "cpu", script: bool = False, ranks: int = 1) -> Resolved:
    return load(config).resolve(ranks, device, script=script)


def refusal(config: dict[str, Any], device: Any = "cpu", script: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config, device, script)
    return str(caught.value)


def optimizer(config: dict[str, Any]) -> OptimizerConfig:
    found = resolve({"optimizer": config}).optimizer
    assert found is not None
    return found


# ---- precision


@pytest.mark.parametrize(
    ("sections", "device", "precision"),
    [
        ({}, "cuda", "fp32"),
        ({"bf16": {"enabled": True}}, "cpu", "bf16"),
        ({"bfloat16": {"enabled": True}}, "cpu", "bf16"),
        ({"fp16": {"enabled": True}}, "cuda", "fp16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "cuda", "fp16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "cuda", "bf16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "cpu", "fp32"),
        ({"fp16": {"enabled": "auto"}}, "cuda", "bf16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "cuda", "fp32"),
    ],
)
def test_precision(sections: dict[str, Any], device: Any, precision: str) -> None:
    resolved = resolve(sections, device)
    assert resolved.precision == precision
    if "auto" in json.dumps(sections) and precision != "fp16":
        assert any(f"auto, {precision}" in note for note in resolved.notes)


def test_fp16_needs_a_gpu() -> None:
    message = refusal({"fp16": {"enabled": True}}, "cpu")
    assert '"bf16": {"enabled": true}' in message
    assert "not supported" not in message


def test_what_the_engine_does_with_gradients_and_small_parameters() -> None:
    found = resolve({})
    assert (found.prescale_gradients, found.gradient_predivide_factor) == (False, 1.0)
    quiet = resolve({"log_level": "CRITICAL"})
    assert (quiet.log_level, quiet.zerotop.log.level, found.log_level) == ("critical", "error", None)
    both = resolve({"log_level": "error", "zerotop": {"log": {"level": "debug"}}})
    assert (both.log_level, both.zerotop.log.level) == ("error", "debug")
    for word, kind in (("AVG", "mean"), ("Sum", "sum")):
        assert resolve({"gradient_allreduce_op": word}).gradient_allreduce_op == kind
    assert found.gradient_allreduce_op == "mean"
    assert (found.persistence_threshold, found.zerotop.accumulate) == (100_000, "ranges")
    for spelling in ("stage3_param_persistence_threshold", "param_persistence_threshold"):
        assert resolve({"zero_optimization": {"stage": 3, spelling: 7}}).persistence_threshold == 7
    assert resolve({"zerotop": {"accumulate": "local"}}).zerotop.accumulate == "local"
    assert "leave one of them out" in refusal({"prescale_gradients": True, "gradient_predivide_factor": 2})
    assert "expected more than 0, got 0" in refusal({"gradient_predivide_factor": 0})
    assert 'expected "ranges" or "local", got "global"' in refusal({"zerotop": {"accumulate": "global"}})


def test_activation_checkpointing_is_on_where_its_section_is() -> None:
    assert resolve({}).activation_checkpointing is None
    found = resolve({"activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": 4, "profile": True}})
    assert found.activation_checkpointing is not None
    assert (found.activation_checkpointing.cpu_checkpointing, found.activation_checkpointing.number_checkpoints) == (
        True,
        4,
    )
    assert any(note.startswith("activation_checkpointing.profile: no effect here") for note in found.notes)


def test_gradients_accumulate_in_fp32_or_the_precision_of_the_model() -> None:
    bf16 = {"bf16": {"enabled": True}}
    assert resolve(bf16).grad_accum_dtype == "fp32"
    assert resolve(bf16 | {"data_types": {"grad_accum_dtype": "bfloat16"}}).grad_accum_dtype == "bf16"
    assert "expected fp32 or bf16 when training in bf16, got fp16" in refusal(
        bf16 | {"data_types": {"grad_accum_dtype": "fp16"}}
    )
    assert "expected fp32 when training in fp32" in refusal({"data_types": {"grad_accum_dtype": "bf16"}})


def test_deepspeeds_names_of_the_dtypes_of_parameters_and_buffers() -> None:
    bf16 = {"bf16": {"enabled": True}}
    assert resolve(bf16 | {"data_types": {"buffer_dtype": "bfloat16"}}).zerotop.buffer_dtype == "bf16"
    both = {"data_types": {"buffer_dtype": "bf16", "param_dtype": "bf16"}, "zerotop": {"buffer_dtype": "fp32"}}
    assert resolve(bf16 | both).zerotop.buffer_dtype == "fp32"
    assert "param_dtype: expected bf16, which fp16 and bf16 ask for, got fp16" in refusal(
        bf16 | {"data_types": {"param_dtype": "fp16"}}
    )


def test_communication_type_takes_deepspeeds_spellings() -> None:
    assert resolve({}).communication_data_type is None
    assert resolve({"communication_data_type": "bfp16"}).communication_data_type == "bf16"
    assert resolve({"communication_data_type": "torch.float32"}).communication_data_type == "fp32"


def test_clipping_defaults_to_one_and_zero_is_off() -> None:
    assert resolve({}).gradient_clipping == 1.0
    assert resolve({"gradient_clipping": "auto"}).gradient_clipping == 1.0
    assert resolve({"gradient_clipping": 0}).gradient_clipping == 0.0


# ---- optimizer


def test_without_a_section_the_built_in_trainer_takes_adamw_and_a_script_its_own() -> None:
    chosen = resolve({}).optimizer
    assert chosen is not None
    assert (chosen.type, chosen.lr, chosen.adam_w_mode) == ("AdamW", 3e-4, True)
    assert any(note.startswith("optimizer: AdamW with lr 0.0003") for note in resolve({}).notes)
    assert resolve({}, script=True).optimizer is None


@pytest.mark.parametrize(
    ("section", "kind", "decay"),
    [
        ({"type": "Adam", "params": {"weight_decay": 0.1}}, "AdamW", 0.1),
        ({"type": "Adam", "params": {"weight_decay": 0.1, "adam_w_mode": False}}, "Adam", 0.1),
        ({"type": "AdamW", "params": {"weight_decay": 0.1, "adam_w_mode": False}}, "AdamW", 0.1),
        ({"type": "adamw"}, "AdamW", 0.0),
        ({"type": "FusedAdam"}, "AdamW", 0.0),
        ({"type": "DeepSpeedCPUAdam"}, "AdamW", 0.0),
        ({"type": "AdamW", "params": {"torch_adam": True}}, "AdamW", 0.01),
        ({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}, "Adam", 0.0),
    ],
)
def test_adam_decays_as_in_deepspeed(section: dict[str, Any], kind: str, decay: float) -> None:
    found = optimizer(section)
    assert (found.type, found.adam_w_mode, found.weight_decay) == (kind, kind == "AdamW", decay)
    assert found.lr == 1e-3


def test_adam_that_decays_as_adamw_says_so() -> None:
    notes = resolve({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}}).notes
    assert any("Adam decays weights directly" in note and "adam_w_mode false" in note for note in notes)


def test_auto_lr_is_ours_and_is_said() -> None:
    resolved = resolve({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}})
    assert resolved.optimizer is not None
    assert (resolved.optimizer.lr, resolved.optimizer.betas) == (3e-4, (0.9, 0.999))
    assert "optimizer.params.lr: 0.0003, the default" in resolved.notes
    assert "optimizer.params.betas: [0.9, 0.999], the default" in resolved.notes


def test_bias_correction_is_kept() -> None:
    assert not optimizer({"type": "Adam", "params": {"bias_correction": False}}).bias_correction


def test_torch_optimizer_gets_only_what_the_file_gives() -> None:
    found = optimizer({"type": "sgd", "params": {"lr": 0.1, "momentum": 0.9, "foreach": True}})
    assert found.type == "SGD"
    assert found.torch_kwargs() == {"lr": 0.1, "momentum": 0.9}


def test_params_of_every_optimizer_are_torchs() -> None:
    """Names and defaults agree with torch.optim, so that a file's keys mean there what they mean here."""
    torch = pytest.importorskip("torch")
    import inspect

    from runtime.config.optimizers import IGNORED_PARAMS, PARAMS

    ours_alone = {"bias_correction", "adam_w_mode", "torch_adam"}
    not_here = {"self", "params", *IGNORED_PARAMS}
    for name, model in PARAMS.items():
        adam = name in ("Adam", "AdamW")
        theirs = {
            key: parameter.default
            for key, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items()
            if key not in not_here and not (adam and key in ("amsgrad", "maximize", "decoupled_weight_decay"))
        }
        ours = {key: field.default for key, field in model.model_fields.items() if key not in ours_alone}
        if adam:
            ours["weight_decay"] = theirs["weight_decay"]  # DeepSpeed's default, not torch's
        assert ours == theirs, name


# ---- scheduler


def test_warmup_lr_leaves_its_maximum_to_each_group() -> None:
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4}},
        "scheduler": {"type": "WarmupLR", "params": params},
        "zerotop": {"train": {"steps": 300}},
    }
    assert resolve(config).scheduler == WarmupLR(
        warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=30, warmup_type="log", last_batch_iteration=-1
    )


def test_warmup_decay_takes_its_end_from_the_run() -> None:
    params = {"total_num_steps": "auto", "warmup_max_lr": 1e-4, "warmup_num_steps": 7, "warmup_type": "linear"}
    found = resolve({"scheduler": {"type": "WarmupDecayLR", "params": params}, "zerotop": {"train": {"steps": 70}}})
    assert isinstance(found.scheduler, WarmupDecayLR)
    assert (found.scheduler.total_num_steps, found.scheduler.warmup_num_steps) == (70, 7)
    assert "scheduler.params.total_num_steps: 70, as zerotop.train.steps" in found.notes


def test_cosine_with_empty_params() -> None:
    found = resolve({"scheduler": {"type": "WarmupCosineLR", "params": {}}, "zerotop": {"train": {"steps": 50_000}}})
    assert found.scheduler == WarmupCosineLR(
        warmup_num_steps=1000,
        warmup_type="log",
        last_batch_iteration=-1,
        total_num_steps=50_000,
        warmup_min_ratio=0.0,
        cos_min_ratio=0.0001,
    )
    short = resolve({"scheduler": {"type": "WarmupCosineLR"}, "zerotop": {"train": {"steps": 200}}}).scheduler
    assert short is not None
    assert short.warmup_num_steps == 20


def test_a_script_must_say_how_many_steps_a_decay_has() -> None:
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}
    assert "give the number here or as zerotop.train.steps" in refusal(config, script=True)
    resolve(config | {"zerotop": {"train": {"steps": 9}}}, script=True)


def test_warmup_under_a_script_with_its_own_optimizer() -> None:
    found = resolve({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, script=True).scheduler
    assert isinstance(found, WarmupLR)
    assert (found.warmup_max_lr, found.warmup_num_steps) == (None, 0)


def test_warmup_longer_than_the_run_is_said() -> None:
    notes = resolve({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 999}}}).notes
    assert "scheduler: the warm-up of 999 steps is longer than total_num_steps = 200" in notes


# ---- our own section, the whole


def test_built_in_trainer_has_a_model_and_steps_and_a_script_does_not() -> None:
    ours, theirs = resolve({}).zerotop, resolve({}, script=True).zerotop
    assert (ours.model.preset, ours.train.steps) == ("gpt-small", 200)
    assert (theirs.model.preset, theirs.train.steps) == (None, None)


def test_notes_come_once_and_only_when_there_is_something_to_say() -> None:
    quiet = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zerotop": {"model": {"preset": "gpt-tiny"}, "data": {"files": ["*.txt"]}, "train": {"steps": 1}},
    }
    assert resolve(quiet).notes == ()
    config = load(quiet | {"steps_per_print": 10, "wandb": {"enabled": True}, "amp": {"enabled": False}})
    first, second = config.resolve(1, "cpu").notes, config.resolve(2, "cpu").notes
    assert first == second
    assert [note.partition(":")[0] for note in first] == ["steps_per_print", "wandb"]


def test_digest_is_of_what_is_trained() -> None:
    base = resolve({"train_batch_size": 8})
    assert len(base.digest()) == 12
    assert int(base.digest(), 16) >= 0
    assert resolve({"train_batch_size": 8, "steps_per_print": 3}).digest() == base.digest()
    assert resolve({"train_micro_batch_size_per_gpu": 8}).digest() == base.digest()
    assert resolve({"train_batch_size": 8, "zerotop": {"train": {"seed": 1}}}).digest() != base.digest()
    assert resolve({"train_batch_size": 8}, ranks=2).digest() != base.digest()


def test_resolved_is_immutable_and_reads_back() -> None:
    resolved = resolve({"optimizer": {"type": "SGD", "params": {"nesterov": True, "momentum": 0.9}}})
    with pytest.raises(ValueError, match="frozen"):
        resolved.stage = 1
    again = Resolved.from_json(resolved.to_json())
    assert again == resolved
    assert again.digest() == resolved.digest()


def test_world_size_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="world_size"):
        load({}).resolve(0, "cpu")


def test_every_key_is_documented() -> None:
    """Below each field of each section stands a docstring."""
    folder = Path(runtime.config.__file__).parent
    fields, bare = 0, []
    for file in sorted(folder.glob("*.py")):
        for section in ast.walk(ast.parse(file.read_text())):
            bases = [ast.unparse(base) for base in section.bases] if isinstance(section, ast.ClassDef) else []
            if not isinstance(section, ast.ClassDef) or "Section" not in bases:
                continue
            for statement, below in zip(section.body, [*section.body[1:], None], strict=True):
                if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                    continue
                if statement.target.id.startswith("_"):
                    continue
                fields += 1
                if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                    bare.append(f"{section.name}.{statement.target.id}")
    assert fields > 100
    assert [name for name in bare if not name.startswith(("Batch.", "Findings.", "Origin."))] == []


def test_config_never_imports_torch() -> None:
    heavy = ("torch", "numpy", "zerotop")
    code = f"import sys, runtime.config, runtime.config.knobs; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60), check=True)
    assert done.stdout.strip() == "[]"


def test_a_gpu_that_is_not_there_cannot_update() -> None:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zerotop": {"offload": {"update": "GPU"}},
    }
    assert load(settings).resolve(1, "cuda").zerotop.offload.update == "gpu"
    with pytest.raises(ConfigError, match=r'zerotop\.offload\.update: "gpu" needs a GPU, and this run is on the CPU'):
        load(settings).resolve(1, "cpu")


def test_deepspeed_s_keys_of_an_engine_s_config() -> None:
    """transformers' Trainer asks `engine.config.get("zero_optimization", {}).get("stage")` before it saves."""
    raw = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    resolved = load(raw).resolve(2, "cpu", script=True)
    assert resolved.get("zero_optimization", {}).get("stage") == 3
    assert resolved.get("zero_optimization")["offload_optimizer"]["device"] == "cpu"
    assert resolved.get("train_batch_size") == 12
    assert resolved.get("bf16") == {"enabled": True} and not resolved.get("fp16")["enabled"]
    assert resolved.get("optimizer")["params"]["lr"] == 0.1
    assert resolved.get("scheduler") is None and resolved.get("tensor_parallel", {}) == {}
