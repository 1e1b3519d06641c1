"""DeepSpeed keys that zerotop does not implement: those without effect, and those that are refused, with reasons.

A key is ignored, with a note, if the trained parameters are the same without it, up to rounding. A key is refused if
ignoring it would change the results, or if it makes the file something other than a training config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .errors import Path, dotted

_UNITS = (
    "zerotop communicates unit by unit (a unit is one block of the model), directly from flat buffers, so there are "
    "no buckets or copies to configure"
)
_GATHER = "a stage 3 unit is unsharded one unit ahead of its use and resharded after it, whatever its size"
_MEASURED = "time, memory and communication are always measured; the screen shows them"
_SEGMENTS = "torch's allocator reuses memory; there is no separate buffer for activations"
_RECORDED = "every run is recorded in its run directory; zerotop.writers sends its figures to trackers"
_NVME = "it only concerns offload to NVMe"
_ANY_OPTIMIZER = "every supported optimizer runs at every stage, on the kernel that fits where its states live"
_CHECKPOINT = "checkpoints are written atomically by every rank and readable at any world size and stage"
_COMPILE = "zerotop does not compile the model; call torch.compile in your script"
_NOT_DEEPSPEED = "DeepSpeed has no such key either"
_SEQUENCE = "there is no sequence parallelism here"
_NOT_USED_SINCE = "DeepSpeed itself no longer reads it"

NO_EFFECT: dict[str, str] = {
    # the top level
    "steps_per_print": "progress lines follow zerotop.log.interval",
    "wall_clock_breakdown": _MEASURED,
    "memory_breakdown": _MEASURED,
    "timers": _MEASURED,
    "dump_state": "launch writes the resolved config into the run directory",
    "sparse_gradients": "gradients are dense; an embedding's gradient is the same",
    "disable_allgather": _NOT_USED_SINCE,
    "allgather_size": _UNITS,
    "zero_allow_untested_optimizer": _ANY_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _ANY_OPTIMIZER,
    "graph_harvesting": "CUDA graphs are not used",
    "vocabulary_size": "DeepSpeed only uses it for a warning about alignment",
    "use_data_before_expert_parallelism": "there is no expert parallelism here",
    "seq_parallel_communication_data_type": _SEQUENCE,
    "seq_parallel_comm_data_type": _SEQUENCE,
    "pipeline": "only DeepSpeed's PipelineModule reads it",
    "activation_checkpointing.partition_activations": "it is for model-parallel ranks, and there are none",
    "activation_checkpointing.contiguous_memory_optimization": _SEGMENTS,
    "activation_checkpointing.synchronize_checkpoint_boundary": "nothing here needs the GPU to wait at a boundary",
    "activation_checkpointing.profile": _MEASURED,
    "checkpoint.load_universal": _CHECKPOINT,
    "checkpoint.use_node_local_storage": "all ranks write to one shared folder",
    "checkpoint.parallel_write": _CHECKPOINT,
    "checkpoint.writer": _CHECKPOINT,
    "checkpoint.checkpoint_serialization": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "datastates": _CHECKPOINT,
    "aio": _NVME,
    "compression_training": "everything in it is disabled",
    "comms_logger": _MEASURED,
    "flops_profiler": _MEASURED,
    "tensorboard": _RECORDED,
    "wandb": _RECORDED,
    "csv_monitor": _RECORDED,
    "comet": _RECORDED,
    "compile": _COMPILE,
    "cuda_visible_devices": _NOT_DEEPSPEED + "; set the environment variable CUDA_VISIBLE_DEVICES",
    "log": _NOT_DEEPSPEED + "; progress lines follow zerotop.log.interval",
    # sections
    "optimizer.legacy_fusion": _ANY_OPTIMIZER,
    "fp16.opt_level": "it is a setting of NVIDIA's Apex, not of fp16",
    "fp16.fused_mode": _ANY_OPTIMIZER,
    "bf16.immediate_grad_update": "gradients are accumulated as each unit's backward ends anyway",
    "bf16.check_grad_overflow": "a step whose gradients are not finite is always skipped, and said",
    "zero_optimization.contiguous_gradients": _UNITS,
    "zero_optimization.reduce_scatter": _UNITS,
    "zero_optimization.reduce_bucket_size": _UNITS,
    "zero_optimization.use_multi_rank_bucket_allreduce": _UNITS,
    "zero_optimization.allgather_partitions": _UNITS,
    "zero_optimization.allgather_bucket_size": _UNITS,
    "zero_optimization.round_robin_gradients": _UNITS,
    "zero_optimization.sub_group_size": _UNITS,
    "zero_optimization.overlap_comm": _UNITS,
    "zero_optimization.zero_hpz_partition_size": "parameters are sharded over all ranks, with no second copy per node",
    "zero_optimization.mics_hierarchical_params_gather": "parameters are sharded over all ranks",
    "zero_optimization.zeropp_loco_param": "it only concerns quantized gradients",
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.gather_16bit_weights_on_model_save": "save_16bit_model always unshards the weights",
    "zero_optimization.ignore_unused_parameters": "a parameter that a step does not use gets a zero gradient",
    "zero_optimization.legacy_stage1": _NOT_USED_SINCE,
    "zero_optimization.memory_efficient_linear": "modules are used as they are",
    "zero_optimization.override_module_apply": "modules are used as they are",
    "zero_optimization.leaf_module": _GATHER,
    "zero_optimization.prefetch_bucket_size": _GATHER,
    "zero_optimization.model_persistence_threshold": _GATHER,
    "zero_optimization.max_live_parameters": _GATHER,
    "zero_optimization.max_reuse_distance": _GATHER,
    "zero_optimization.module_granularity_threshold": _GATHER,
    "zero_optimization.use_all_reduce_for_fetch_params": _GATHER,
    "zero_optimization.allgather_sequential": _GATHER,
    "zero_optimization.partition_stream_chunk_size": _GATHER,
    "zero_optimization.log_trace_cache_warnings": "there is no trace cache",
    "zero_optimization.enable_sanity_checks": "the engine's checks are always on",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _NVME,
    "zero_optimization.cpu_offload_use_pin_memory": "cpu_offload is not on; write it as offload_optimizer.pin_memory",
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_optimizer.buffer_count": _NVME,
    "zero_optimization.offload_optimizer.pipeline": _NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NVME,
    "zero_optimization.offload_optimizer.fast_init": _NVME,
    "zero_optimization.offload_optimizer.buffer_size": _NVME,
    "zero_optimization.offload_optimizer.super_offload": "who updates offloaded states is not chosen by this key",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "who updates offloaded states is not chosen by this key",
    "zero_optimization.offload_optimizer.convert_grad_on_cpu": "who updates offloaded states is not chosen by this key",
    "zero_optimization.offload_param.nvme_path": _NVME,
    "zero_optimization.offload_param.buffer_count": _NVME,
    "zero_optimization.offload_param.buffer_size": _NVME,
    "zero_optimization.offload_param.max_in_cpu": _NVME,
}
"""Key -> why it has no effect. A section covers all keys in it."""

STAGE3_PREFIX = "stage3_"
"""Prefix of some zero_optimization keys, which DeepSpeed also accepts without it."""

SPELLINGS: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.gather_fp16_weights_on_model_save": "zero_optimization.gather_16bit_weights_on_model_save",
    "zero_optimization.cpu_offload_params": "zero_optimization.cpu_offload_param",
}
"""Old spelling -> current one."""

Test = Callable[[Any], bool]


def _on(value: Any) -> bool:
    """Whether a flag is set."""
    return value is not None and value is not False and value != "auto"


def _enabled(section: Any) -> bool:
    """Whether a section is enabled; without the key `enabled` it is not, as in DeepSpeed."""
    return _on(section.get("enabled")) if isinstance(section, dict) else _on(section)


def _enabled_inside(section: Any) -> bool:
    """Whether any `enabled` inside a section is set."""
    if not isinstance(section, dict):
        return _on(section)
    return any(_on(value) if key == "enabled" else isinstance(value, dict) and _enabled_inside(value)
               for key, value in section.items())  # fmt: skip


def _many(value: Any) -> bool:
    """Whether a number of ranks, or a section with one, is above 1."""
    if isinstance(value, dict):
        return any(_many(value.get(key)) for key in ("autotp_size", "tp_size", "autoep_size")) or _enabled(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 1


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _sequence_passes(value: Any) -> bool:
    return isinstance(value, list | tuple) and "autosp" in value


_EXACT = "it quantizes communication, and zerotop keeps results exact"

_NO_QUANTIZATION = (
    "zerotop trains adapters on 16-bit or fp32 weights; 4-bit and 8-bit base weights (QLoRA) cannot be sharded. Leave "
    "it out: at zero_optimization.stage 3 the frozen weights are sharded over the ranks, and "
    "zero_optimization.offload_param keeps them in host memory"
)
_QUANTIZING = ("load_in_4bit", "load_in_8bit", "quantization", "quantization_config", "quantize", "qlora", "bits")

REFUSED: dict[str, tuple[Test, str]] = {
    **{
        f"zerotop.{section}.{key}": (_on, _NO_QUANTIZATION)
        for section in ("model", "lora")
        for key in _QUANTIZING
    },
    "autotuning": (_enabled, "a file for DeepSpeed's autotuner is not a training config; set enabled to false, or see "
                             "`zerotop plan`"),
    "compression_training": (_enabled_inside, "it quantizes or prunes the model, which zerotop does not do"),
    "quantize_training": (_enabled_inside, "it quantizes the model while training, which zerotop does not do"),
    "weight_quantization": (_on, "it belongs to inference"),
    "amp": (_enabled, 'NVIDIA\'s Apex is not used; write "bf16": {"enabled": true} or "fp16": {"enabled": true}'),
    "torch_autocast": (_enabled, 'the model itself is in 16 bit here; write "bf16": {"enabled": true} instead'),
    "tensor_parallel": (_many, "zerotop shards over data-parallel ranks only; there is no tensor parallelism"),
    "sequence_parallel_size": (_many, "zerotop shards over data-parallel ranks only; there is no sequence parallelism"),
    "expert_parallel": (_many, "zerotop shards over data-parallel ranks only; there is no expert parallelism"),
    "compile.passes": (_sequence_passes, "autosp is sequence parallelism, which zerotop does not have"),
    "progressive_layer_drop": (_enabled, "it skips layers at random while training, which zerotop does not do"),
    "curriculum_learning": (_enabled, "it changes which tokens are trained on, which zerotop does not do"),
    "data_efficiency": (_enabled, "it changes which samples and tokens are trained on, which zerotop does not do"),
    "sparse_attention": (_on, "zerotop has no sparse attention layers"),
    "eigenvalue": (_enabled, "it steers quantization while training, which zerotop does not do"),
    "elasticity": (_enabled, "it chooses the batch sizes by itself; give train_batch_size and "
                             "train_micro_batch_size_per_gpu, or set enabled to false"),
    "hybrid_engine": (_enabled, "it mixes training with DeepSpeed's inference kernels, which zerotop does not have"),
    "bf16.bf16_master_weights_and_grads": (_on, "master weights are always fp32"),
    "bf16.bf16_optimizer_states": (_on, "optimizer states are always fp32"),
    "fp16.fp16_master_weights_and_grads": (_on, "master weights are always fp32"),
    "zero_optimization.zero_quantized_weights": (_on, _EXACT),
    "zero_optimization.zero_quantized_gradients": (_on, _EXACT),
    "zero_optimization.zero_quantized_nontrainable_weights": (_on, "it stores frozen weights rounded"),
    "zero_optimization.mics_shard_size": (_positive,
        "leave it out: zerotop shards over all ranks, never over subgroups"),
    "zero_optimization.zenflow": (_on, "it updates most parameters late, which changes results"),
}  # fmt: skip
"""Key -> (test whether a value is refused, reason). Other values mean that the feature is off, and pass silently."""


def deepspeed_key_names(section: Path) -> Iterator[str]:
    """The keys of `section` that zerotop knows but does not implement, for suggestions."""
    prefix = dotted(section) + "." if section else ""
    for key in (*NO_EFFECT, *REFUSED, *SPELLINGS):
        if key.startswith(prefix) and "." not in key[len(prefix) :]:
            yield key[len(prefix) :]
