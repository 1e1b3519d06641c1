"""zerotop doctor: what this machine has and lacks, and how to fix it."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.native.loading import INSUFFICIENT_DRIVER
from runtime.process.extras import INSTALL_TRAINING
from zerotop.diagnose.oomkill import SHARED_ENOUGH_BYTES
from zerotop.format import bytes_text

if TYPE_CHECKING:
    from runtime.wire.node import GpuStats

GIB = 2**30
_CUDA_FIXES = {
    INSUFFICIENT_DRIVER: "update the NVIDIA driver, or build with an older CUDA: make install with its nvcc in PATH",
    802: "start the service nvidia-fabricmanager: GPUs that are connected by NVSwitch wait for it",
    803: "reboot: the driver was updated, and its old kernel module is still loaded",
    804: "update the NVIDIA driver: CUDA's forward compatibility does not cover this GPU",
}
"""By cudaError_t."""
_GPU_LABELS = ("util", "SM", "power", "SM clock", "limited by", "temp", "PCIe link")
"""What `doctor` shows of a GPU; the rest is on the rank screen."""


class Finding(NamedTuple):
    """`level` is ok; warn: something is missing or slow; fail: zerotop cannot work here. `fix` is empty if all is
    well."""

    name: str
    level: str
    text: str
    fix: str = ""


def register(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine",
        description="Check this machine: each line is ok, warn or fail, with a fix. Exit code 1 if one fails.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings; the exit code is 1 if one of them is fail."""
    from zerotop.output import print_json, show

    found = findings()
    if arguments.json:
        print_json([finding._asdict() for finding in found])
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            show(f"{finding.level:<4}  {finding.name:<{width}}  {finding.text}")
            if finding.fix:
                show(f"{'':<4}  {'':<{width}}  -> {finding.fix}")
    return 1 if any(finding.level == "fail" for finding in found) else 0


def findings() -> list[Finding]:
    """The result of every check."""
    return [finding for check in CHECKS for finding in _listed(check())]


def _listed(found: Finding | list[Finding]) -> list[Finding]:
    return found if isinstance(found, list) else [found]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    text = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info >= (3, 14):
        return Finding("python", "warn", text, "newer than what zerotop was tested with: 3.11 to 3.13 are")
    return Finding("python", "ok", text)


def _torch() -> Finding:
    found = _version("torch")  # importing it would take seconds
    if found is None:
        return Finding("torch", "warn", "not installed: this box can watch runs, not train", INSTALL_TRAINING)
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        return Finding("torch", "warn", f"{found}: not a version that zerotop knows", "tested with 2.11 to 2.15")
    if (major, minor) < (2, 11):
        return Finding("torch", "fail", found, "training needs torch 2.11 or newer: pip install -U torch")
    if (major, minor) > (2, 15):
        return Finding("torch", "warn", f"{found}: newer than what zerotop was tested with", "2.11 to 2.15 are tested")
    return Finding("torch", "ok", found)


def _cpu_kernels() -> Finding:
    from runtime import native

    text = native.cpu_status()
    if not native.available():
        return Finding("CPU kernels", "warn", text, "without them the optimizer on the CPU runs in plain torch, slower")
    return Finding("CPU kernels", "ok", text)


def _cuda_kernels() -> Finding:
    from runtime import native

    text = native.cuda_status()
    try:
        code, _ = native.cuda_problem()
    except ImportError:
        if shutil.which("nvidia-smi"):
            return Finding("CUDA kernels", "warn", text, "this box has a GPU: install nvcc, then run make install")
        return Finding("CUDA kernels", "ok", text)
    if code:
        return Finding("CUDA kernels", "fail", text, _CUDA_FIXES.get(code, "does nvidia-smi work?"))
    if native.too_old():
        fix = "offloaded states are updated on the CPU; ZT_CUDA_ARCHS (CONTRIBUTING.md) builds for other GPUs"
        return Finding("CUDA kernels", "warn", text, fix)
    return Finding("CUDA kernels", "ok", text)


def _nvml() -> list[Finding]:
    try:
        import pynvml
    except ImportError:
        return [Finding("NVML", "warn", "nvidia-ml-py is not installed", "pip install nvidia-ml-py")]
    from zerotop.probe.nvml import look_once

    gpus, driver, note = look_once(pynvml)
    if not note:
        return [Finding("NVML", "ok", ", ".join([f"driver {driver}", _models(gpus)])), *_gpus(gpus), *_torch_on(gpus)]
    if shutil.which("nvidia-smi"):
        return [Finding("NVML", "warn", note, "does nvidia-smi work? GPU figures show as n/a until it does")]
    if note == "no NVIDIA driver":
        return [Finding("NVML", "ok", f"{note}: GPU figures show as n/a")]
    return [Finding("NVML", "warn", note, "GPU figures show as n/a until it answers")]


def _torch_on(gpus: list[GpuStats]) -> list[Finding]:
    """A finding if there are GPUs, and a torch that can't use them."""
    from zerotop.launch.devices import torch_has_cuda

    if not gpus or _version("torch") is None or torch_has_cuda():
        return []
    return [
        Finding(
            "torch on GPUs",
            "warn",
            "torch is built without CUDA: runs train on the CPU",
            "install a CUDA build of torch",
        )
    ]


def _models(gpus: list[GpuStats]) -> str:
    counts = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{count} × {name}" for name, count in counts.items()) or "no GPU"


def _gpus(gpus: list[GpuStats]) -> list[Finding]:
    """A line for each GPU, and one for each reason why figures are missing."""
    from zerotop.state.gpu import BUSY_PERCENT, gpu_concerns
    from zerotop.state.gpu_text import gpu_items, missing_text

    findings, missing = [], dict[str, list[int]]()
    for gpu in gpus:
        busy = [
            other.sm_clock_mhz
            for other in gpus
            if other.name == gpu.name and other.sm_clock_mhz and (other.utilization_percent or 0.0) >= BUSY_PERCENT
        ]
        found = gpu_concerns(gpu, statistics.median(busy) if len(busy) > 1 else None)
        items = (
            ()
            if gpu.lost or not gpu.uuid
            else [f"{label} {value}" for label, value in gpu_items(gpu) if label in _GPU_LABELS]
        )
        text = ", ".join(items) or gpu.name
        findings.append(Finding(f"GPU {gpu.index}", "warn" if found else "ok", text, "; ".join(c.text for c in found)))
        if why := missing_text(gpu):
            missing.setdefault(why, []).append(gpu.index)
    for why, indices in missing.items():
        where = "" if len(indices) == len(gpus) else f" (GPU {', '.join(map(str, indices))})"
        findings.append(Finding("GPU figures", "ok", f"{why}{where}"))
    return findings


def _ssh() -> Finding:
    from zerotop.source.ssh import SshError, ssh_words

    try:
        words = ssh_words()
    except SshError as error:
        return Finding("ssh", "warn", str(error), "only needed to attach to runs on other machines")
    return Finding("ssh", "ok", " ".join([shutil.which(words[0]) or words[0], *words[1:]]))


def _terminal() -> Finding:
    encoding = (sys.stdout.encoding or "").lower()
    locale = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "")
    text = f"TERM={os.environ.get('TERM', '')} locale={locale or 'none'} output={encoding or 'unknown'}"
    if encoding.replace("-", "") != "utf8":
        return Finding("terminal", "warn", text, "bars and dots need UTF-8: export LC_ALL=C.UTF-8")
    if os.environ.get("TERM", "") in ("", "dumb") and sys.stdout.isatty():
        return Finding("terminal", "warn", text, "the screen needs a real terminal type: export TERM=xterm-256color")
    return Finding("terminal", "ok", text)


def _host_memory() -> Finding:
    from runtime.host.memory_limits import read_limits

    limits = read_limits()
    text = f"{bytes_text(limits.available_bytes)} available"
    if limits.group_left_bytes < limits.available_bytes:
        left, limit = bytes_text(limits.group_left_bytes), bytes_text(limits.group_limit_bytes)
        return Finding("host memory", "ok", f"{left} left of this control group's {limit}: what offload can take")
    return Finding("host memory", "ok", f"{text}: what offload can take")


def _cores() -> Finding:
    from runtime.host.cores import read_machine

    machine = read_machine()
    nodes = {core.node for core in machine.cores}
    logical = sum(len(core.cpus) for core in machine.cores)
    text = f"{len(machine.cores)} physical, {logical} logical, {len(nodes)} NUMA node{'s' if len(nodes) > 1 else ''}"
    if machine.quota_cpus < len(machine.cores):
        return Finding("cores", "ok", f"{text}; the control group pays for {machine.quota_cpus:g}")
    return Finding("cores", "ok", text)


def _locked_memory() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("ulimit -l", "ok", "unlimited")
    text = f"{bytes_text(soft)} of memory may be locked"
    if shutil.which("nvidia-smi"):
        return Finding("ulimit -l", "warn", text, "for InfiniBand set memlock unlimited in /etc/security/limits.conf")
    return Finding("ulimit -l", "ok", f"{text} (matters with InfiniBand only)")


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", "warn", f"{error.strerror}", "ranks of one box exchange data through it")
    text = f"{bytes_text(size.total)}, {bytes_text(size.free)} free"
    if size.total < SHARED_ENOUGH_BYTES:
        return Finding("/dev/shm", "warn", text, "NCCL may fail: start the container with --shm-size=8g or --ipc=host")
    return Finding("/dev/shm", "ok", text)


def _state_home() -> Finding:
    from zerotop.rundir.paths import RunError, make_private_folder, runs_home, sockets_home

    try:
        home = make_private_folder(runs_home())
    except RunError as error:
        return Finding("state home", "fail", str(error), "set XDG_STATE_HOME to a folder that you may write")
    if not os.access(home, os.W_OK | os.X_OK):
        return Finding("state home", "fail", f"{home} is not writable", "set XDG_STATE_HOME to a folder that is")
    try:
        make_private_folder(sockets_home())
    except RunError as error:
        return Finding("state home", "fail", str(error), "sockets of runs lie there")
    free = shutil.disk_usage(home).free
    if free < GIB:
        return Finding("state home", "warn", f"{home}, {bytes_text(free)} free", "checkpoints go there: make room")
    return Finding("state home", "ok", f"{home}, {bytes_text(free)} free")


def _pyspy() -> Finding:
    import subprocess

    from zerotop.diagnose.pyspy import find_pyspy, ptrace_scope

    program = find_pyspy()
    if program is None:
        text = "not installed: hang reports have no C frames, and no stacks of ranks that answer no signal"
        return Finding("py-spy", "ok", text, "optional: pip install py-spy")
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5)
        text = f"{done.stdout.strip().removeprefix('py-spy ') or 'no version'} ({program})"
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("py-spy", "warn", f"{program} can't be run: {error}", "pip install --force-reinstall py-spy")
    scope = ptrace_scope()
    if scope is not None and scope > 1 and os.geteuid() != 0:
        cure = "an administrator can set kernel.yama.ptrace_scope to 1"
        return Finding("py-spy", "warn", f"{text}; kernel.yama.ptrace_scope={scope} keeps it from reading ranks", cure)
    return Finding("py-spy", "ok", text)


def _flight_recorder() -> Finding:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("torch")  # does not import it
    if spec is None or spec.origin is None:
        return Finding("Flight Recorder", "ok", "n/a without torch")
    sizes = [name for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE") if os.environ.get(name) == "0"]
    if sizes:
        text = f"switched off by {sizes[0]}=0: a hang in torch's own collectives names no missing rank"
        return Finding("Flight Recorder", "warn", text, f"unset {sizes[0]}")
    binding = Path(spec.origin).parent / "lib" / "libtorch_python.so"
    try:
        content = binding.read_bytes() if binding.exists() else b""
    except OSError as error:
        return Finding("Flight Recorder", "ok", f"can't tell: {binding.name}: {error.strerror}")
    found = [name for name in ("_dump_fr_trace", "_dump_nccl_trace") if name.encode() in content]
    if content and not found:
        return Finding("Flight Recorder", "warn", "this torch has none", "torch 2.11 or newer has")
    return Finding(
        "Flight Recorder", "ok", " and ".join(found) or "can't tell: torch's library is not where it usually is"
    )


def _nccl_ras() -> Finding:
    from zerotop.diagnose import ras

    version = next((v for v in (_version(f"nvidia-nccl-cu{cuda}") for cuda in (12, 13)) if v), None)
    address = ras.ras_address(os.environ)
    if address is None:
        switched = f"{ras.ENABLE_VARIABLE}=0" if os.environ.get(ras.ENABLE_VARIABLE) == "0" else ras.ADDRESS_VARIABLE
        return Finding("NCCL RAS", "ok", f"not asked in hangs: {switched} is set so")
    if version is None:
        return Finding("NCCL RAS", "ok", "n/a without the NCCL package of torch's CUDA build")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < (2, 24):
        return Finding("NCCL RAS", "ok", f"NCCL {version} has none (2.24 and newer have)")
    return Finding("NCCL RAS", "ok", f"NCCL {version}, asked in hangs at {address[0]}:{address[1]}")


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    _python,
    _torch,
    _cpu_kernels,
    _cuda_kernels,
    _nvml,
    _pyspy,
    _flight_recorder,
    _nccl_ras,
    _ssh,
    _terminal,
    _cores,
    _host_memory,
    _locked_memory,
    _shared_memory,
    _state_home,
)
