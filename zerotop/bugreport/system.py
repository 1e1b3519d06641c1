"""The versions and the machine behind a run, and which of the person's values are secret."""

from __future__ import annotations

import getpass
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from zerotop.bugreport.redact import Redactor, is_secret_name

_PACKAGES = (
    *("zerotop", "torch", "triton", "numpy", "transformers", "datasets", "peft", "safetensors", "tokenizers"),
    *("textual", "pyzmq", "pydantic", "psutil", "nvidia-ml-py", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "py-spy"),
)
_PREFIXES = (
    *("ZEROTOP_", "NCCL_", "TORCH_", "TORCHELASTIC_", "CUDA_", "OMP_", "MKL_", "KMP_", "GLOO_", "PYTORCH_", "PYTHON"),
    *("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "HF_", "TOKENIZERS_", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("MALLOC_", "NVIDIA_", "LANG", "LC_", "TERM"),
)
"""Beginnings of the environment variables that matter to a run."""


def versions() -> dict[str, Any]:
    """Versions, system, CPU, memory and GPUs of this machine."""
    return {
        "python": sys.version,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "system": platform.platform(),
        "distribution": _distribution(),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **_gpus(),
    }


def environment(pids: Mapping[int, int]) -> dict[str, Any]:
    """The variables that matter, of a rank that lives (`pids`: rank -> process id), else of this process."""
    found, of = dict(os.environ), "the process that made this report"
    for rank, pid in sorted(pids.items()):
        try:
            found, of = psutil.Process(pid).environ(), f"rank {rank}"
            break
        except (psutil.Error, OSError):
            continue
    return {"of": of, "variables": {name: found[name] for name in sorted(found) if name.startswith(_PREFIXES)}}


def redactor_for_me(more: Mapping[str, str] | None = None) -> Redactor:
    """Knows this person's home, name and secrets: the values of secret environment variables, of `more` too, and the
    token that Hugging Face's tools have saved."""
    variables = {**os.environ, **(more or {})}
    secrets = [value for name, value in variables.items() if is_secret_name(name) and not os.path.exists(value)]
    home = Path.home()
    for path in (variables.get("HF_TOKEN_PATH", ""), home / ".cache/huggingface/token", home / ".huggingface/token"):
        try:
            secrets.append(Path(path).read_text().strip() if path else "")
        except (OSError, UnicodeDecodeError):
            continue  # most people have none
    return Redactor(str(home), _user(), secrets)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose uid has no name
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> dict[str, Any]:
    """Driver and GPUs; why there are none otherwise. The serial numbers of GPUs are left out."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # no package, no library, no driver
        return {"driver": None, "gpus": [], "gpu_note": str(error)}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            {"name": _text(pynvml.nvmlDeviceGetName(h)), "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(h).total}
            for h in handles
        ]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return {"driver": _text(pynvml.nvmlSystemGetDriverVersion()), "cuda_driver": cuda, "gpus": gpus, "gpu_note": ""}
    except pynvml.NVMLError as error:
        return {"driver": None, "gpus": [], "gpu_note": str(error)}
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
