"""The ZeRO engine's parts, each knowing only those before it.

layout     which element of which parameter lies where, and who owns it (torch-free)
stage      what a ZeRO stage is: a policy of a few answers
cut        a model's units
weights, init, values   where initial values come from; zero.Init
home       which memory states live in; grad_offload: how gradients get there
pool, gradients, flat   one flat buffer: parameters, masters, gradients
unit       the flats that are gathered, reduced and updated together
waiting    GatheredParameters between zero.Init and the engine
hooks      what modules hold for an engine
schedule   when gradients are reduced; unsharder: when parameters are there; clip: what ranks agree on at a boundary
partition_parameters    what stage 3 hangs on parameters, with DeepSpeed's names
whole      the whole model for those who ask; GatheredParameters
external   calls that DeepSpeed needs and this engine does not
(who updates when: runtime/optim/updates.py)
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
