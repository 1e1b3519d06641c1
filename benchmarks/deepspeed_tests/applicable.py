"""Which of DeepSpeed's tests are about what zerotop does, and what their failures are counted as."""

from __future__ import annotations

import re

FILES = (
    "checkpoint/test_convert_checkpoint.py",
    "checkpoint/test_latest_checkpoint.py",
    "checkpoint/test_lr_scheduler.py",
    "checkpoint/test_other_optimizer.py",
    "checkpoint/test_shared_weights.py",
    "checkpoint/test_sparse.py",
    "checkpoint/test_tag_validation.py",
    "checkpoint/test_zero_optimizer.py",
    "comm/test_dist.py",
    "launcher/test_ds_arguments.py",
    "runtime/activation_checkpointing/test_activation_checkpointing.py",
    "runtime/activation_checkpointing/test_activation_checkpointing_non_reentrant.py",
    "runtime/half_precision/test_dynamic_loss_scale.py",
    "runtime/half_precision/test_zero_optim_overflow.py",
    "runtime/test_data.py",
    "runtime/test_ds_config_dict.py",
    "runtime/test_ds_initialize.py",
    "runtime/test_lr_schedulers.py",
    "runtime/test_multi_output_model.py",
    "runtime/test_multiple_models.py",
    "runtime/test_no_sync_ctxt.py",
    "runtime/test_runtime_utils.py",
    "runtime/utils/test_partition.py",
    "runtime/zero/test_ignore_unused_parameters.py",
    "runtime/zero/test_unwrap_model.py",
    "runtime/zero/test_zero_allreduce_fetch_params.py",
    "runtime/zero/test_zero_config.py",
    "runtime/zero/test_zero_context.py",
    "runtime/zero/test_zero_context_ancestry.py",
    "runtime/zero/test_zero_context_return.py",
    "runtime/zero/test_zero_dynamic_class.py",
    "runtime/zero/test_zero_grad_clip.py",
    "runtime/zero/test_zero_hook_attribute_delegation.py",
    "runtime/zero/test_zero_late_module_attach.py",
    "runtime/zero/test_zero_leaf_module.py",
    "runtime/zero/test_zero_nesting_init.py",
    "runtime/zero/test_zero_offloadpp.py",
    "runtime/zero/test_zero_tensor_fragment.py",
    "utils/test_get_optim_files.py",
    "utils/test_groups.py",
    "utils/test_init_on_device.py",
    "v1/half_precision/test_bf16.py",
    "v1/half_precision/test_gradient_clipping_default.py",
    "v1/half_precision/test_mixed_precision_dtype.py",
    "v1/test_engine_log_level.py",
    "v1/zero/test_offload_states.py",
    "v1/zero/test_stage2_flatten_on_gpu.py",
    "v1/zero/test_zero.py",
    "v1/zero/test_zero2_offload_multi_backward.py",
    "v1/zero/test_zero_activation_checkpoint_lifecycle.py",
    "v1/zero/test_zero_cpu_offload_grad_accum.py",
    "v1/zero/test_zero_functorch_linear.py",
    "v1/zero/test_zero_torch_func.py",
    "v1/zero/test_zero_user_backward.py",
)
"""Below tests/unit. Why the others are left out: reasons.py."""

CAUSES = (
    ("not data parallel: refused by name", r"zerotop shards data-parallel training"),
    ("fp16 on a CPU: refused", r"fp16 needs a GPU"),
    ("an internal of DeepSpeed", r"(zerotop lacks|module 'runtime[\w.]*' has no attribute|No module named|"
                                 r"cannot import name|neither the engine nor its module|object has no attribute)"),
    ("config: refused, with the reason", r"ConfigError"),
    ("another refusal with the way out", r"(CheckpointError|TrainingError|RuntimeError: (engine\.|stage 3|step ))"),
    ("a comparison", r"(AssertionError|assert |DID NOT RAISE|Failed:)"),
    ("no answer within the limit", r"(Test hanged|timed out)"),
)  # fmt: skip
"""Name, and what the message has; the first that fits counts."""


def cause_of(message: str) -> str:
    for name, pattern in CAUSES:
        if re.search(pattern, message):
            return name
    return "something else"
