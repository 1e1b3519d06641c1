"""Every real DeepSpeed config either trains here or says clearly why not."""

from __future__ import annotations

import pytest

from runtime.config import Config, ConfigError, Resolved, load
from tests.harness import ROOT

FOLDER = ROOT / "tests" / "data" / "deepspeed-configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json"))

EXAMPLES = "deepspeedai.DeepSpeedExamples__"
ONE_BIT = "compresses gradients to one bit"
COMPRESSION = "compression_training: it quantizes or prunes the model"
AUTOTUNING = "autotuning: a file for DeepSpeed's autotuner is not a training config"
DATA_EFFICIENCY = "data_efficiency: it changes which samples and tokens are trained on"

REASONS = {
    "OpenGVLab.InternVL__segmentation.zero_configs.adam_zero1_amp.json": "amp: NVIDIA's Apex is not used",
    "OpenGVLab.InternVL__segmentation.zero_configs.adam_zero3_fp16.json": ONE_BIT,
    EXAMPLES + "benchmarks.autosp.configs.autosp_config.json": "there is no sequence parallelism",
    EXAMPLES + "compression.bert.config.XTC.ds_config_W1A8_Qgroup1_fp32.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.XTC.ds_config_layer_reduction_W1Q8_fp32.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.XTC.ds_config_layer_reduction_fp16.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.ZeroQuant.ds_config_W48A8_Qgroup48_lkd_fp32.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.ZeroQuant.ds_config_W8A8_Qgroup48_fp32.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.ds_config_W1A8_Qgroup64_fp16.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.ds_config_W1A8_Qgroup64_fp32.json": COMPRESSION,
    EXAMPLES + "compression.bert.config.ds_config_W1or2A8_Qgroup64_fp16.json": COMPRESSION,
    EXAMPLES + "compression.cifar.config.ds_config_channel_prune.json": COMPRESSION,
    EXAMPLES + "compression.gpt2.config.ds_config_W4or8A8_Qgroup64_fp16.json": COMPRESSION,
    EXAMPLES + "compression.gpt2.config.ds_config_W8A8_Qgroup64_fp32.json": COMPRESSION,
    EXAMPLES + "training.BingBertSquad.1-bit_adam.mpi_ethernet.deepspeed_onebitadam_bsz96_config.json": ONE_BIT,
    EXAMPLES + "training.BingBertSquad.1-bit_adam.mpi_infiniband.deepspeed_onebitadam_bsz96_config.json": ONE_BIT,
    EXAMPLES + "training.BingBertSquad.1-bit_adam.nccl.deepspeed_onebitadam_bsz96_config.json": ONE_BIT,
    EXAMPLES + "training.autotuning.hf.bert-base.ds_config_tune.json": AUTOTUNING,
    EXAMPLES + "training.autotuning.hf.deberta.ds_config_fp16_tune.json": AUTOTUNING,
    EXAMPLES + "training.autotuning.hf.dsconfigs.ds_config_fp16_tune.json": AUTOTUNING,
    EXAMPLES + "training.autotuning.hf.dsconfigs.ds_config_tune.json": AUTOTUNING,
    EXAMPLES
    + "training.bing_bert.01_adam.mpi_ethernet.deepspeed_bsz4k_01adam_config_seq128_mpi_ethernet.json": ONE_BIT,
    EXAMPLES
    + "training.bing_bert.01_adam.mpi_ethernet.deepspeed_bsz4k_01adam_config_seq512_mpi_ethernet.json": ONE_BIT,
    EXAMPLES
    + "training.bing_bert.1-bit_adam.mpi_ethernet.deepspeed_bsz4k_onebitadam_config_seq128_mpi_ethernet.json": ONE_BIT,
    EXAMPLES
    + "training.bing_bert.1-bit_lamb.mpi_ethernet.deepspeed_bsz32k_onebitlamb_config_seq512_mpi_ethernet.json": ONE_BIT,
    EXAMPLES
    + "training.bing_bert.1-bit_lamb.mpi_ethernet.deepspeed_bsz64k_onebitlamb_config_seq128_mpi_ethernet.json": ONE_BIT,
    EXAMPLES
    + "training.bing_bert.1-bit_lamb.mpi_infiniband.deepspeed_bsz64k_onebitlamb_config_seq128_mpi_infiniband.json": (
        ONE_BIT
    ),
    EXAMPLES + "training.bing_bert.1-bit_lamb.nccl.deepspeed_bsz64k_onebitlamb_config_seq128_nccl.json": ONE_BIT,
    EXAMPLES + "training.bing_bert.deepspeed_bsz4k_progressive_layer_drop_config_seq128.json": "skips layers at random",
    EXAMPLES + "training.data_efficiency.gpt_finetuning.config.ds_config_gpt_base_random_ltd.json": DATA_EFFICIENCY,
    EXAMPLES + "training.data_efficiency.vit_finetuning.config.ds_config_cifar_random_ltd.json": DATA_EFFICIENCY,
    EXAMPLES + "training.data_efficiency.vit_finetuning.config.ds_config_imagenet_random_ltd.json": DATA_EFFICIENCY,
    EXAMPLES + "training.tensor_parallel.hf_integration.configs.ds_config.json": "there is no tensor parallelism",
}
"""Files that do not train here -> part of the reason."""

RANKS = (1, 2, 4, 8, 64)


def fit(config: Config) -> Resolved:
    """Resolved at the first number of ranks that the batch sizes allow."""
    errors = []
    for ranks in RANKS:
        try:
            return config.resolve(ranks, "cuda")
        except ConfigError as error:
            errors.append(str(error))
    raise AssertionError(f"no number of ranks fits: {errors}")


def test_the_folder_is_complete() -> None:
    assert len(FILES) == 119
    assert set(REASONS) <= set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name not in REASONS])
def test_training_config_loads_and_resolves(name: str) -> None:
    resolved = fit(load(FOLDER / name))
    assert resolved.micro_batch * resolved.accumulation * resolved.world_size == resolved.global_batch
    assert Resolved.from_json(resolved.to_json()) == resolved
    assert len(set(resolved.notes)) == len(resolved.notes), "a note is given twice"


@pytest.mark.parametrize("name", sorted(REASONS))
def test_other_config_says_why_not(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(FOLDER / name)
    message = str(caught.value)
    assert message.startswith(str(FOLDER / name))
    assert REASONS[name] in message


@pytest.mark.parametrize("name", [name for name in FILES if name not in REASONS])
def test_no_key_is_dropped_silently(name: str) -> None:
    """Every key of the file is one of ours (then it is in the Config), or is named in a note, or is off."""
    config = load(FOLDER / name)
    notes = "\n".join(fit(config).notes)
    for key, value in config.raw.items():
        if key in Config.model_fields:
            continue
        off = isinstance(value, dict) and value.get("enabled") is False
        assert off or key in notes, f"{key}: {value}"
    for key, value in config.raw.get("zero_optimization", {}).items():
        ours = key in type(config.zero_optimization).model_fields
        assert ours or f"zero_optimization.{key}" in notes or value is False or key == "cpu_offload"


def test_old_spelling_of_optimizer_offload() -> None:
    config = load(FOLDER / "deepspeedai.DeepSpeed__tests.model.Megatron_GPT2.ds_config_func_bs4_zero2_offload.json")
    offload = config.resolve(1, "cuda").offload_optimizer
    assert offload is not None
    assert offload.device == "cpu"


def test_parameters_are_offloaded_only_at_stage_3() -> None:
    resolved = load(FOLDER / "CarperAI.trlx__examples.summarize_rlhf.sft.ds_config_gptj.json").resolve(1, "cuda")
    assert resolved.stage == 2
    assert resolved.offload_param is None
    assert any("offload_param: no effect here, because the stage is 2" in note for note in resolved.notes)


def test_tutorial_at_four_ranks_shows_the_product_and_each_way_out() -> None:
    config = load(FOLDER / "tutorial_zero2_offload.json")
    assert config.resolve(1, "cuda").global_batch == 64
    with pytest.raises(ConfigError) as caught:
        config.resolve(4, "cuda")
    message = str(caught.value)
    assert "64 != 16 x 4 x 4 = 256" in message
    ways = message.partition("Any one of these works: ")[2]
    assert ways == (
        "train_batch_size 256, or gradient_accumulation_steps 1, or train_micro_batch_size_per_gpu 4, or 1 rank"
    )
    for override in (
        "train_batch_size=256",
        "gradient_accumulation_steps=1",
        "train_micro_batch_size_per_gpu=4",
    ):
        load(FOLDER / "tutorial_zero2_offload.json", [override]).resolve(4, "cuda")


def test_tutorial_on_a_cpu_names_both_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        load(FOLDER / "tutorial_zero2_offload.json").resolve(4, "cpu")
    batch, precision = caught.value.problems
    assert "64 != 16 x 4 x 4" in batch
    assert '"bf16": {"enabled": true}' in precision
    assert "fp16 needs a GPU" in precision and "--device" not in precision


def test_quickstart() -> None:
    resolved = load(ROOT / "examples" / "quickstart.json").resolve(2, "cpu")
    assert resolved.stage == 2
    assert resolved.accumulation > 1
    assert not [note for note in resolved.notes if "no effect" in note]
