"""DeepSpeed's class of the `zero_optimization` section, and its enum of stages.

initialize() reads runtime/config/deepspeed.py instead, and says which of these keys have no effect: this class is for
scripts that build or read the section by its class, as `DeepSpeedConfig(...).zero_config` is.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import Any

from pydantic import Field, model_validator

from runtime.zero.offload_config import (
    DeepSpeedSection,
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    OffloadDeviceEnum,
)

__all__ = [
    "DeepSpeedZeroConfig",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
    "ZeroStageEnum",
]

_STAGE3 = "stage3_"
_OLD_SPELLINGS = {"gather_fp16_weights_on_model_save": "gather_16bit_weights_on_model_save"}
_OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


class ZeroStageEnum(IntEnum):
    """DeepSpeed's names of the ZeRO stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class DeepSpeedZeroConfig(DeepSpeedSection):
    """`zero_optimization`, with DeepSpeed's defaults. Keys may have the prefix stage3_; the old cpu_offload keys become
    sections."""

    stage: ZeroStageEnum = ZeroStageEnum.disabled
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, ge=0)
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, ge=0)
    overlap_comm: bool = False
    """By default only at stage 3."""
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: DeepSpeedZeroOffloadParamConfig | None = None
    offload_optimizer: DeepSpeedZeroOffloadOptimizerConfig | None = None
    zenflow: Any = None
    sub_group_size: int = Field(1_000_000_000, ge=0)
    prefetch_bucket_size: int = Field(50_000_000, ge=0)
    param_persistence_threshold: int = Field(100_000, ge=0)
    model_persistence_threshold: int = Field(sys.maxsize, ge=0)
    max_live_parameters: int = Field(1_000_000_000, ge=0)
    max_reuse_distance: int = Field(1_000_000_000, ge=0)
    gather_16bit_weights_on_model_save: bool = False
    module_granularity_threshold: int = 0
    use_all_reduce_for_fetch_params: bool = False
    allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    zero_hpz_partition_size: int = Field(1, ge=0)
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    zeropp_loco_param: dict[str, Any] | None = None
    mics_shard_size: int = -1
    mics_hierarchical_params_gather: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: Any = None

    @model_validator(mode="before")
    @classmethod
    def _by_present_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found: dict[str, Any] = {}
        for key, value in given.items():
            name = key.removeprefix(_STAGE3)
            name = _OLD_SPELLINGS.get(name, name)
            found[name if name in cls.model_fields else key] = value
        pinned = found.pop("cpu_offload_use_pin_memory", None)
        for old, new in _OLD_OFFLOAD.items():
            if found.pop(old, False) and found.get(new) is None:
                found[new] = {"device": "cpu"} if pinned is None else {"device": "cpu", "pin_memory": pinned}
        if found.get("overlap_comm", "auto") in (None, "auto"):
            found["overlap_comm"] = found.get("stage") == ZeroStageEnum.weights
        return found
