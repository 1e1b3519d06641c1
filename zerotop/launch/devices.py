"""The device of a run and how many ranks fit on it, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Literal

from runtime.process.extras import INSTALL_TRAINING
from zerotop.probe.nvml import count_devices
from zerotop.rundir.paths import RunError

Device = Literal["cpu", "cuda"]


def choose(device: str, nproc: int | None) -> tuple[Device, int]:
    """The device and number of ranks for `launch`. --device auto takes the GPUs if there are any; --nproc defaults to
    all of them, on the CPU to two where it has two cores.

    Raises RunError if the machine cannot do what was asked.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device {device}: expected auto, cpu or cuda")
    if nproc is not None and nproc < 1:
        raise RunError(f"--nproc {nproc}: expected at least 1 rank")
    cuda_built = torch_has_cuda()
    if device == "cpu":
        return "cpu", _on_cpu(nproc)
    gpus, note = visible_gpus()
    if device == "auto" and (gpus == 0 or not cuda_built):
        return "cpu", _on_cpu(nproc)
    if not cuda_built:
        raise RunError(
            "--device cuda: the installed torch is built without CUDA; "
            "install a CUDA build of torch, or use --device cpu"
        )
    if gpus == 0:
        raise RunError(f"--device cuda: no GPU can be used here ({note}); use --device cpu")
    if nproc is not None and nproc > gpus:
        raise RunError(
            f"--nproc {nproc}: this machine has {gpus} GPU{'s' * (gpus > 1)}{note and f' ({note})'}; "
            f"use --nproc {gpus} or --device cpu"
        )
    return "cuda", nproc or gpus


def _on_cpu(nproc: int | None) -> int:
    count = nproc or min(2, os.cpu_count() or 1)
    limit = 8 * (os.cpu_count() or 1)
    if count > limit:
        raise RunError(
            f"--nproc {count}: this machine has {os.cpu_count()} cores; at most {limit} ranks make sense on them"
        )
    return count


def visible_gpus() -> tuple[int, str]:
    """How many GPUs a rank would see, and a note: why none, or what limits them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    present, note = count_devices()
    if given is None or present == 0:
        return present, note
    names = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= present):
            break  # CUDA ignores everything from the first one that it doesn't know
        names.append(name)
    return len(names), f"CUDA_VISIBLE_DEVICES={given}"


def torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA, read from its version file. Raises RunError if torch is not
    installed."""
    found = importlib.util.find_spec("torch")  # a top-level name: finds it without running it
    if found is None or found.origin is None:
        raise RunError(
            f"torch is not installed, this is the monitor alone: {INSTALL_TRAINING} adds what training needs"
        )
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return True  # an unusual build: let torch itself say what it can't do
    match = re.search(r"^cuda\b[^=]*= *(.+)$", text, re.MULTILINE)
    return match is None or match[1].strip() != "None"
