"""Runs at the start of every Python process of a command that `zerotop run` has wrapped (this folder leads PYTHONPATH).

It gives each rank a log of its own, Python stacks on demand, and a heartbeat once torch.distributed is there. Only the
standard library is used before that: any Python may run here, and most processes are not ranks.
"""

import contextlib
import ctypes
import faulthandler
import importlib.machinery
import importlib.util
import os
import signal
import stat
import sys
import threading
import time

_LOOK_S = 0.5
_IMPORTS_S = 20.0
"""How long a script's imports are awaited: its training may be one of them."""
_HERE = os.path.dirname(os.path.abspath(__file__))
_PR_SET_PTRACER = 0x59616D61


def _rank() -> str | None:
    """The rank that torchrun, DeepSpeed or Slurm has given to this process; None if it is none."""
    return next((n for name in ("RANK", "SLURM_PROCID") if (n := os.environ.get(name, "")).isdecimal()), None)


def _is_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _is_stream(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _slurm_task() -> int | None:
    """The process that Slurm has started for this rank: this one or an ancestor. None outside Slurm."""
    process = os.getpid()
    while process > 1:
        try:
            with open(f"/proc/{process}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{parent}/comm") as file:
                if file.read().strip() == "slurmstepd":
                    return process
        except (OSError, ValueError, IndexError):
            return None
        process = parent
    return None


def _own_log(logs: str, rank: str) -> None:
    """Move output that goes to the log of the whole command, or to srun, which mixes that of all tasks into it, to a
    log of this rank. Output that somebody has redirected (a script that reads what its child prints) stays where it
    is."""
    common = os.path.join(logs, "launcher.log")
    task = _slurm_task() if "SLURM_PROCID" in os.environ else None
    ours = [
        descriptor
        for descriptor in (1, 2)
        if _is_file(descriptor, common)
        or (task and _is_stream(descriptor) and _is_file(descriptor, f"/proc/{task}/fd/{descriptor}"))
    ]
    if ours:
        handle = os.open(os.path.join(logs, f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in ours:
            os.dup2(handle, descriptor)
        os.close(handle)


def _stacks(logs: str, rank: str) -> None:
    """SIGUSR2 appends the stacks of all threads to a file, as in runtime/telemetry/stacks.py."""
    if signal.getsignal(signal.SIGUSR2) in (signal.SIG_DFL, signal.SIG_IGN):
        path = os.path.join(logs, f"stacks-rank-{rank}.txt")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR2, file=handle, all_threads=True, chain=False)
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2, all_threads=True)
    supervisor = os.environ.get("ZEROTOP_SUPERVISOR_PID", "")
    if supervisor.isdecimal() and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(int(supervisor)), 0, 0, 0)


def _imports(thread: int | None) -> bool:
    """Whether the thread is importing something."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _heartbeat() -> None:
    """Report to the run once torch.distributed is initialised, where this Python has zerotop."""

    def wait() -> None:
        while True:
            # Present but without the function: it is being imported.
            is_initialized = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
            if is_initialized is not None and is_initialized():
                break
            time.sleep(_LOOK_S)
        # Two threads that import the same modules may each wait for what the other has begun. Python then gives one of
        # them a module that is not complete, and the script may be importing our engine just now.
        until = time.monotonic() + _IMPORTS_S
        while _imports(threading.main_thread().ident) and time.monotonic() < until:
            time.sleep(_LOOK_S / 5)
        with contextlib.suppress(ImportError):
            importlib.import_module("runtime.telemetry")  # the package first: waits for one that has begun to import it
            from runtime.telemetry.watching.automatic import begin

            begin()

    threading.Thread(target=wait, name="zerotop-wait", daemon=True).start()


def _next_sitecustomize() -> None:
    """Run the sitecustomize that this one hides, as Python would have."""
    paths = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _prepare() -> None:
    run, attempt = os.environ.get("ZEROTOP_RUN", ""), os.environ.get("ZEROTOP_ATTEMPT", "")
    logs = os.path.join(run, "logs", attempt)
    rank = _rank()
    if not run or not attempt or not os.path.isdir(logs):
        return
    if rank is not None:
        _own_log(logs, rank)
        _heartbeat()
    _stacks(logs, rank or "0")


_prepare()
_next_sitecustomize()
