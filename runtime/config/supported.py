"""What a config may say and this version's trainer cannot do yet: better no run than another one than was asked for."""

from __future__ import annotations

from .errors import ConfigError
from .resolved import Resolved

STAGES = (0, 1, 2)


def refuse_unsupported(config: Resolved) -> None:
    """Raise ConfigError with every such setting at once. Launch asks before it starts anything, initialize() again."""
    problems = []
    if config.stage not in STAGES:
        problems.append(
            f"zero_optimization.stage: expected {', '.join(map(str, STAGES))}, got {config.stage}, which is not "
            "supported yet; stage 2 comes nearest"
        )
    if config.precision == "fp16":
        problems.append('fp16.enabled: fp16 training is not supported yet; use "bf16": {"enabled": true}')
    for key, section in (
        ("offload_optimizer", config.offload_optimizer),
        ("offload_param", config.offload_param),
    ):
        if section is not None:
            problems.append(f'zero_optimization.{key}: not supported yet; remove it, or set its device to "none"')
    if config.communication_data_type not in (None, config.grad_accum_dtype):
        problems.append(
            "communication_data_type: gradients are reduced in the precision in which they accumulate "
            f"({config.grad_accum_dtype}) for now; remove the key"
        )
    if config.zerotop.model.path is not None:
        problems.append(
            "zerotop.model.path: Hugging Face models are not supported by the built-in trainer yet; use "
            "zerotop.model.preset, or a script of your own: zerotop launch CONFIG -- SCRIPT.py"
        )
    if problems:
        raise ConfigError(problems)
