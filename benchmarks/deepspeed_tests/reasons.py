"""Why tests of DeepSpeed need not pass here, one by one, and which files are not run at all."""

from __future__ import annotations

import re
from collections.abc import Iterable

INTERNAL = "DeepSpeed's internals: buffers, hooks, helpers and classes that no script names"
OTHER_ERROR = "refused here, too, with an error of another class or in other words"
WORKS = "works here, and DeepSpeed refuses it"
CONFIG = "a key of the config that is refused, with the reason"

REASONS: dict[str, tuple[tuple[str, str], ...]] = {
    INTERNAL: (
        ("comm/test_dist.py", "TestDistInferenceAllReduce"),
        ("launcher/test_ds_arguments.py", "test_core_binding_arguments"),
        ("checkpoint/test_zero_optimizer.py", "test_save_exclude_.*frozen_weights"),  # opens DeepSpeed's files
        ("checkpoint/test_zero_optimizer.py", "test_chmod_exception_handling|elastic_checkpoint_is_deprecated"),
        ("runtime/activation_checkpointing/test_activation_checkpointing.py", "test_configure_with_contiguous"),
        ("runtime/test_ds_config_dict.py", "test_get_bfloat16_enabled|TestBatchConfig"),
        ("runtime/test_ds_initialize.py", "TestBf16ZeRO0UnfusedOptimizer"),
        ("runtime/test_runtime_utils.py", "test_call_to_str|test_count_used_parameters|TestCheckOverflow"),
        ("runtime/zero/test_unwrap_model.py", "TestUnwrapModel::"),
        ("runtime/zero/test_zero_allreduce_fetch_params.py", ""),
        (
            "runtime/zero/test_zero_context.py",
            "test_multiple_all_gather_handles|TestScatterGather|throughput_calculation",
        ),
        ("runtime/zero/test_zero_context_return.py", "test_ext_param_return"),
        ("runtime/zero/test_zero_grad_clip.py", ""),
        ("runtime/zero/test_zero_hook_attribute_delegation.py", ""),
        ("runtime/zero/test_zero_late_module_attach.py", "TestEnsureZeroOrderedDict|test_idempotent"),
        ("runtime/zero/test_zero_leaf_module.py", "_config|_coercion"),
        ("v1/half_precision/test_gradient_clipping_default.py", "TestGradientClippingConfig"),
        ("v1/half_precision/test_mixed_precision_dtype.py", "TestMixedPrecision(DtypeResolution|ConfigValidation)"),
        ("v1/half_precision/test_mixed_precision_dtype.py", "TestCastModule|test_config_defaults"),
        ("v1/test_engine_log_level.py", "TestLogLevelConfig"),
        ("v1/zero/test_offload_states.py", ""),
        ("v1/zero/test_stage2_flatten_on_gpu.py", ""),
        ("v1/zero/test_zero.py", "TestBF16OptimizerGradReduction|TestPartitionNcclAlignment"),
        ("v1/zero/test_zero.py", "TestZero3ParamPartitioning|TestZeroAdamOptimizerStepCount"),
        ("v1/zero/test_zero_user_backward.py", "TestZeroUserBackwardLeafModule"),  # optimizer.leaf_parameters
        ("v1/zero/test_zero2_offload_multi_backward.py", "allocates_no_cpu_accumulator"),
        ("v1/zero/test_zero_activation_checkpoint_lifecycle.py", "(?<!clean_retry)$"),
        ("v1/zero/test_zero_cpu_offload_grad_accum.py", ""),
        ("v1/zero/test_zero_functorch_linear.py", ""),
    ),
    "expert parallelism": (
        ("runtime/test_runtime_utils.py", "TestClipGradNorm::test_gather"),
        ("checkpoint/test_zero_optimizer.py", "moe"),
        ("utils/test_groups.py", ""),
    ),
    "pipeline parallelism: how layers and activations are divided": (("runtime/utils/test_partition.py", ""),),
    "MiCS and ZeRO++: hierarchical and quantized sharding": (
        ("checkpoint/test_zero_optimizer.py", "zeropp"),
        ("runtime/zero/test_zero_context.py", "TestMiCS"),
    ),
    OTHER_ERROR: (
        ("checkpoint/test_tag_validation.py", r"test_checkpoint_unique_tag\[FAIL\]"),
        ("runtime/test_ds_config_dict.py", "test_invalid_gradient_allreduce_op|rejects_zenflow|TestNoModel"),
        ("runtime/test_ds_initialize.py", r"TestClientLrScheduler::test\[.*(None|Callable)-_LRScheduler\]"),
        ("runtime/test_no_sync_ctxt.py", "test_engine_step|test_reentry"),
    ),
    WORKS: (
        ("runtime/zero/test_zero_leaf_module.py", "test_no_grad_input_error"),
        ("checkpoint/test_zero_optimizer.py", "test_elastic_checkpoint_change_dp"),  # another world size
        ("runtime/test_ds_config_dict.py", "gradient_allreduce_rejects_(zero3|deepcompile)"),
        ("runtime/test_ds_initialize.py", "TestOptimizerImplementation"),
        ("v1/half_precision/test_bf16.py", "TestZeroAllowUntestedOptimizer"),
        ("v1/zero/test_zero_user_backward.py", "test_unmanaged_rejects_(overlap|pipeline)"),
        ("runtime/test_no_sync_ctxt.py", r"test_zero_stage\[[23]-"),
        ("runtime/zero/test_ignore_unused_parameters.py", "False"),
        ("v1/zero/test_zero_user_backward.py", "test_scale_validates_scalar_loss"),
        ("v1/zero/test_zero.py", r"TestZeroOffloadOptim::test\[True\]"),
        ("v1/zero/test_zero_torch_func.py", "test_direct_backward_raises_without_functorch"),
        ("runtime/zero/test_zero_context.py", "AllRanksErrorOnModification"),  # before the engine: rank 0's are kept
    ),
    CONFIG: (
        ("checkpoint/test_other_optimizer.py", "test_checkpoint_unfused_optimizer"),  # Lamb
        ("runtime/test_ds_config_dict.py", "compression|quantized_eigenvalue"),
        ("v1/half_precision/test_bf16.py", "TestBF16MasterWeightsGradients|TestBF16OptimizerStates"),  # masters in bf16
    ),
    "refused here with an error, where DeepSpeed warns and takes a value of its own": (
        ("runtime/test_lr_schedulers.py", "unknown_warmup_type_falls_back"),
    ),
    "bf16.check_grad_overflow: a step whose gradients are not finite is always skipped, also with false": (
        ("runtime/half_precision/test_zero_optim_overflow.py", "test_ignore_grad_overflow"),
    ),
    "after an exception in a backward the engine goes no further, for the ranks may have parted": (
        ("v1/zero/test_zero_activation_checkpoint_lifecycle.py", "clean_retry$"),
    ),
    "sparse gradients: they land in dense flat memory here": (("checkpoint/test_sparse.py", r"True-True"),),
    "an engine without an optimizer takes no model_parameters, so that none is forgotten": (
        ("runtime/zero/test_zero_late_module_attach.py", "test_forward_after_late_submodule_attach"),
    ),
    "under zero.Init rank 0 keeps what it has built until the engine takes it": (
        ("runtime/zero/test_zero_context.py", "TestZeroGatheredParametersFree"),
        ("runtime/zero/test_zero_context_ancestry.py", "TestSerialParamInit"),
        ("v1/zero/test_zero.py", "TestZero3InitForParentWeightInitialization|TestParamPartitioningSkipInit"),
    ),
    "a sharded parameter keeps its shape, and so its numel()": (("v1/zero/test_zero.py", "TestZeroPartitionCache"),),
    "the root unit, all of so small a model, stays whole from a backward to the step": (
        ("v1/zero/test_zero_user_backward.py", r"[\[-]3-.*nopersist|test_no_grad_input_accumulation.*nopersist"),
    ),
    "compared with weights that began rounded to bf16; masters begin as the model was built, in fp32": (
        # With the model rounded before initialize(), and gradients accumulated in bf16, these and the next ones pass.
        ("v1/zero/test_zero_user_backward.py", "test_checkpointed_multiple_backward|test_non_scalar_backward"),
        ("v1/zero/test_zero_user_backward.py", "test_multiple_engines_combined_loss"),
    ),
    "compared with gradients that accumulate in bf16; here they do in fp32, unless the config says otherwise": (
        ("v1/zero/test_zero_user_backward.py", "test_scale_with_gradient_accumulation|test_grad_accumulation"),
    ),
    "saving in the middle of an accumulation is refused: a checkpoint holds no gradients": (
        ("checkpoint/test_zero_optimizer.py", "test_save_before_accum_grad_is_done|test_hybrid_optimizer_state"),
    ),
    "reads parameters right after step(), beside which the offloaded update goes on: engine.synchronize() waits": (
        ("v1/zero/test_zero_user_backward.py", "UnmanagedGradientAccumulation.*Offload.*matches_managed"),
    ),
    "engine.coalesce_grad_reduction(): several backwards before a step add up without it": (
        ("v1/zero/test_zero_user_backward.py", "test_unmanaged_rejects_coalesce"),
    ),
    "zero_grad() keeps what engine.backward() has accumulated: scripts call it between micro-steps": (
        ("runtime/test_no_sync_ctxt.py", "test_multiple_ctxts"),
    ),
    "the optimizer is the engine's own class at every stage, as DeepSpeed's is from stage 1 on": (
        ("runtime/test_ds_initialize.py", "TestClientOptimizer|TestConfigOptimizer"),
    ),
    "args.deepscale_config: a name of args.deepspeed_config from before DeepSpeed's first release": (
        ("runtime/test_ds_config_dict.py", "TestDeprecatedDeepScaleConfig"),
    ),
    "asks for a package named deepspeed": (("runtime/zero/test_zero_nesting_init.py", "test_nested_parallel_init"),),
}
"""Reason -> (file, regular expression for Class::test[parameters]); it counts where the test fails."""

MESSAGES = (
    ("fp16 needs a GPU", "fp16 needs a GPU|is float16: expected"),
    ("not data parallel: refused by name", "zerotop shards data-parallel training"),
    ("its fixture is not found by this version of pytest", r"fixture '\w+' not found"),
)
"""Reason, and what the message has; these come before the names."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "tensor, sequence, pipeline and expert parallelism": (
        "checkpoint/test_autotp_uc_checkpoint.py", "checkpoint/test_moe_checkpoint.py", "checkpoint/test_pipeline.py",
        "model_parallelism", "module_inject", "pipe", "runtime/pipe", "runtime/tensor_parallel",
        "runtime/test_tp_plan_extraction.py", "sequence", "sequence_parallelism", "ulysses_alst", "v1/moe",
    ),
    "compression, data efficiency, progressive layer drop, eigenvalues, muP, 1-bit optimizers": (
        "compression", "runtime/comm", "runtime/half_precision/onebit", "runtime/test_data_efficiency.py",
        "runtime/test_engine_eigenvalue.py", "runtime/test_mup_optimizers.py", "runtime/test_pld.py",
    ),
    "MiCS, ZeRO++, ZenFlow": (
        "checkpoint/test_mics_optimizer.py", "runtime/zero/test_zeropp.py", "runtime/zenflow",
    ),
    "GPUs only: fp16, fp8": ("runtime/half_precision/test_fp16.py", "runtime/half_precision/test_fp8.py"),
    "offload to NVMe": ("runtime/zero/test_nvme_checkpointing.py", "v1/nvme"),
    "inference, hybrid engine, roll-outs, models of modalities": (
        "hybrid_engine", "inference", "linear", "runtime/rollout", "v1/multimodal",
    ),
    "autotuning, elasticity, profilers, monitors, DeepSpeed's launcher": (
        "autotuning", "comm/test_comms_logger.py", "elasticity", "launcher/test_multinode_runner.py",
        "launcher/test_run.py", "launcher/test_user_args.py", "monitor", "profiling",
    ),
    "DeepSpeed's compiler passes": ("compile", "v1/compile"),
    "kernels of DeepSpeed and how they are built; page-locked memory of a GPU": (
        "ops", "utils/test_byte_cast.py", "utils/test_pin_memory_tracker.py", "v1/ops", "v1/pin_memory",
    ),
    "torch autocast inside the engine, which the config refuses": (
        "runtime/test_autocast.py", "runtime/zero/test_zero_autocast_mixed_dtype.py",
        "v1/half_precision/test_with_autocast.py", "v1/zero/test_zero_autocast.py",
    ),
    "sparse gradients": ("runtime/sparse_tensor",),
    "DeepSpeed's universal checkpoints: those of zerotop load at any world size and stage as they are": (
        "checkpoint/test_reshape_checkpoint.py", "checkpoint/test_universal_checkpoint.py",
    ),
    "internals: classes of the config, buffers, streams, hooks": (
        "runtime/activation_checkpointing/test_offload_activations.py", "runtime/test_ds_config_model.py",
        "runtime/test_precision_config_dynamic_scale.py", "runtime/test_precision_config_loss_scale.py",
        "runtime/zero/test_zero_linear_direct_init.py", "runtime/zero/test_zero_tiled.py", "utils/test_nvtx.py",
        "utils/test_partition_balanced.py", "v1/accelerator", "v1/zero/test_overlap_comm_record_stream.py",
        "v1/zero/test_zero_coalesce_grad_reduction.py", "v1/zero/test_zero_hook_count_regression.py",
        "v1/zero/test_zero_init_pg_contradiction.py",
    ),
}  # fmt: skip
"""Reason -> files and folders below tests/unit."""


def unjudged(files: Iterable[str]) -> list[str]:
    """Of files below tests/unit that are not run: those that nobody has given a reason for."""
    known = tuple(place for places in LEFT_OUT.values() for place in places)
    return [file for file in files if not any(file == place or file.startswith(f"{place}/") for place in known)]


def reason_of(file: str, test: str, message: str) -> str:
    """Why this test of `file` need not pass; empty where nobody has said so."""
    for reason, words in MESSAGES:
        if re.search(words, message):
            return reason
    for reason, tests in REASONS.items():
        if any(file == where and re.search(pattern, test) for where, pattern in tests):
            return reason
    return ""
