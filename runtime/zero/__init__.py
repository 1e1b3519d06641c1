"""The ZeRO engine's parts, each knowing only those before it.

stage      a ZeRO stage as a policy: which states, gradients and parameters are sharded
cut        divides a model into units
init, absent, values    zero.Init, and where a parameter's initial values come from
state_placement         the memory in which masters, optimizer states and accumulated gradients live
pool, gradients, flat   one flat parameter group: its parameters, shards, masters and gradients
parameter  the classes that parameters have while they are resharded or their gradients are reduced
unit       the flat parameter groups that are unsharded, reduced and updated together
hooks      module hooks that do not keep their engine alive
unshard    when each unit's parameters are unsharded (stage 3)
reduce     when each unit's gradients are reduced
script_backward, script_changes     a script's own loss.backward(), and its changes to the model
step_stats, fingerprint             what all ranks agree on at a boundary
places, partition_parameters        DeepSpeed's stage 3 attributes of parameters (ds_numel, ds_status, ...)
waiting    GatheredParameters between zero.Init and the engine
leaf_modules    modules below which the model is not cut into units
full       state_dict(), load_state_dict() and GatheredParameters at every stage
external   calls that DeepSpeed needs and this engine accepts

Shard arithmetic is in runtime/plan/layout.py; when each unit is updated, in runtime/optim/updates.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.deepspeed_paths import attribute_of

if TYPE_CHECKING:
    from runtime.zero.external import (
        register_external_parameter,
        unregister_external_parameter,
        unwrap_model_for_generation,
    )
    from runtime.zero.full import GatheredParameters
    from runtime.zero.init import Init
    from runtime.zero.partition_parameters import ZeroParamStatus

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "register_external_parameter",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
]

_MODULES = {
    "Init": "init",
    "GatheredParameters": "full",
    "ZeroParamStatus": "partition_parameters",
    "register_external_parameter": "external",
    "unregister_external_parameter": "external",
    "unwrap_model_for_generation": "external",
}


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.zero", name, _MODULES)
