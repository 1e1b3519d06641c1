"""Reads and checks a config from a path or dictionary, and reports all problems at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from . import optimizers, schedulers
from .config import Config
from .errors import Findings, Path, clipped, nearest, shown
from .keys import AUTO, key_paths, select_keys, validate
from .output_checks import check_outputs
from .source import read


def load(source: str | FilePath | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read and check a config: a path to a JSON file, or the dictionary itself.

    `overrides` are `dotted.key=value` strings that replace single keys; the value is JSON, or else taken as a string.
    Raises ConfigError, which lists every problem with its key and its line.
    """
    raw, origin = read(source, overrides)
    found = Findings(
        origin=origin, vocabulary={path[-1]: path for path in reversed([*key_paths(Config, ()), *_PARAM_PATHS])}
    )
    kept = select_keys(Config, _old_spellings(raw, found), (), found)
    if "optimizer" in kept:
        kept["optimizer"] = _optimizer(kept["optimizer"], found)
    if "scheduler" in kept:
        kept["scheduler"] = _scheduler(kept["scheduler"], found)
    _check_combinations(kept, found)
    config = validate(Config, kept, (), found)
    if config is not None:
        check_outputs(config.zerotop, found)
    found.raise_if_any()
    assert config is not None  # a config that fails its check leaves a problem
    config._found, config._raw = found, raw
    return config


_PARAM_PATHS: list[Path] = [
    *(("optimizer", "params", name) for name in optimizers.AdamParams.model_fields),
    *(("scheduler", "params", name) for model in schedulers.PARAMS.values() for name in model.model_fields),
]


def _old_spellings(raw: dict[str, Any], found: Findings) -> dict[str, Any]:
    """A copy of the raw config without old spellings of DeepSpeed that take more than a renamed key."""
    raw = dict(raw)
    if "bfloat16" in raw:
        raw.setdefault("bf16", raw["bfloat16"])
        del raw["bfloat16"]
    zero = raw.get("zero_optimization")
    if isinstance(zero, bool):
        raw["zero_optimization"] = {"stage": int(zero)}
    elif isinstance(zero, dict):
        zero = raw["zero_optimization"] = dict(zero)
        pin = zero.get("cpu_offload_use_pin_memory")
        moved = False
        for old, new in (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
            ("cpu_offload_params", "offload_param"),
        ):
            if old not in zero:
                continue
            value = zero.pop(old)
            if not isinstance(value, bool):
                found.problem(("zero_optimization", old), f": expected true or false, got {shown(value)}")
            elif value and zero.get(new) is None:
                zero[new] = {"device": "cpu"} | ({"pin_memory": pin} if pin is not None else {})
                moved = True
        if moved:
            zero.pop("cpu_offload_use_pin_memory", None)
    return raw


def _optimizer(kept: dict[str, Any], found: Findings) -> Any:
    """The optimizer section, or None after recording why it cannot be used."""
    path: Path = ("optimizer", "type")
    name = kept.get("type")
    if not isinstance(name, str):
        found.problem(path, _no_name(name, path, "AdamW", found))
        return None
    if reason := optimizers.REFUSED.get(name.strip().lower()):
        found.problem(path, f": {name} cannot run here: {reason}. Use AdamW, or one of {', '.join(optimizers.PARAMS)}")
        return None
    canonical = optimizers.canonical(name)
    if canonical is None:
        near = nearest(name, optimizers.PARAMS)
        hint = f"Did you mean {near}? " if near else ""
        found.problem(path, f": unknown optimizer {clipped(name)}. {hint}Known: {', '.join(optimizers.PARAMS)}")
        return None
    raw = kept.get("params", {})
    where = ("optimizer", "params")
    if isinstance(raw, Mapping):
        raw = dict(raw)
        for key in [key for key in raw if key in optimizers.IGNORED_PARAMS]:
            found.ignored((*where, key), "it selects an implementation and does not change results")
            del raw[key]
        if "max_grad_norm" in raw:
            found.problem(
                (*where, "max_grad_norm"), ": not an optimizer parameter here; write gradient_clipping at the top level"
            )
            del raw["max_grad_norm"]
        for key in ("amsgrad", "maximize"):
            if key in raw and canonical in ("Adam", "AdamW") and raw.pop(key):
                found.problem((*where, key), f": {canonical} has no {key} here; leave it out")
    model = optimizers.PARAMS[canonical]
    params = validate(model, select_keys(model, raw, where, found), where, found)
    return None if params is None else {"type": canonical, "params": params}


def _no_name(name: Any, path: Path, example: str, found: Findings) -> str:
    if name is None and path not in found.autos:
        return f" is missing; write for example {example}"
    return f": expected a name such as {example}, got {shown(name if name is not None else AUTO)}"


def _scheduler(kept: dict[str, Any], found: Findings) -> Any:
    """The scheduler section, or None after recording why it cannot be used."""
    path: Path = ("scheduler", "type")
    name = kept.get("type")
    if not isinstance(name, str):
        found.problem(path, _no_name(name, path, "WarmupLR", found))
        return None
    if name not in schedulers.PARAMS:
        near = nearest(name, schedulers.PARAMS)
        hint = f"Did you mean {near}? " if near else ""
        found.problem(path, f": unknown scheduler {clipped(name)}. {hint}Known: {', '.join(schedulers.PARAMS)}")
        return None
    where = ("scheduler", "params")
    model = schedulers.PARAMS[name]
    params = validate(model, select_keys(model, kept.get("params", {}), where, found), where, found)
    return None if params is None else {"type": name, "params": params}


def _check_combinations(kept: dict[str, Any], found: Findings) -> None:
    """Record problems of keys that are valid alone but not together."""
    if kept.get("fp16", {}).get("enabled") is True and kept.get("bf16", {}).get("enabled") is True:
        found.problem(("fp16", "enabled"), ": fp16 and bf16 are both enabled; set one of them to false")
    for section in ("offload_optimizer", "offload_param"):
        offload = kept.get("zero_optimization", {}).get(section, {})
        if offload.get("device") == "nvme":
            found.problem(
                ("zero_optimization", section, "device"),
                ': offload to NVMe is not supported; "cpu" keeps them in host memory',
            )
            offload.pop("device")
    model = kept.get("zerotop", {}).get("model", {})
    if model.get("preset") is not None and model.get("path") is not None:
        found.problem(("zerotop", "model"), ": preset and path are both given; keep one")
    _check_finetuning(kept.get("zerotop", {}), found)


def _check_finetuning(section: dict[str, Any], found: Findings) -> None:
    """Record problems of settings for Hugging Face models that cannot be used together."""
    data, evaluation = (section.get(key, {}) for key in ("data", "evaluation"))
    files, weights = data.get("files", ()), data.get("weights", ())
    count = 1 if isinstance(files, str) else len(files) if isinstance(files, list | tuple) else 0
    if isinstance(weights, list | tuple) and weights and len(weights) != count:
        found.problem(
            ("zerotop", "data", "weights"),
            f": expected one number per entry of zerotop.data.files ({count}), got {len(weights)}",
        )
    if evaluation.get("files") and evaluation.get("split") is not None:
        found.problem(("zerotop", "evaluation"), ": files and split are both given; keep one")
    elif evaluation and not (evaluation.get("files") or evaluation.get("split") or evaluation.get("prompts")):
        found.problem(
            ("zerotop", "evaluation"),
            ': expected held-out data, such as "split": 0.02 or "files": ["held-out.jsonl"], or prompts',
        )
