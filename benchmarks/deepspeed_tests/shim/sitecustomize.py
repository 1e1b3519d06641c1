"""For processes of DeepSpeed's own tests, children too: `deepspeed` and all below it is zerotop's `runtime`.

DeepSpeed's test files import everything that any test of theirs needs. So that the others can run, what zerotop lacks
is there as a name, and using it raises NotImplementedError.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import multiprocessing
import multiprocessing.pool
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Shim(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "deepspeed":
            return None
        from runtime.deepspeed_paths import same_module

        stands_for = "runtime" + fullname.removeprefix("deepspeed")
        try:
            module = importlib.import_module(stands_for)
        except ModuleNotFoundError:
            return ModuleSpec(fullname, _Lacking(), is_package=True)
        if stands_for == "runtime":
            importlib.import_module("runtime.engine").Engine._get_optimizer_ckpt_name = _no_file
            _on_cpus()
        if stands_for == "runtime.ops":  # what DeepSpeed could build here: nothing has to be
            module.__compatible_ops__ = defaultdict(lambda: True)  # type: ignore[attr-defined]
        return same_module(fullname, stands_for)


class _Lacking(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Lacking,), {"path": f"{module.__name__}.{name}", "NAME": name})

        module.__getattr__ = find  # type: ignore[method-assign]
        for name, value in HELPERS.get(module.__name__, {}).items():
            setattr(module, name, value)


class Lacking:
    path = ""

    def __init__(self, *_given: Any, **_named: Any) -> None:
        raise NotImplementedError(f"zerotop lacks {self.path}")


def required_torch_version(min_version: float | str | None = None, max_version: float | str | None = None) -> bool:
    """What the tests choose their cases by; of DeepSpeed's helpers the one that runs at import."""
    import torch

    def key(version: float | str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", str(version))[:2])

    ours = key(torch.__version__)
    return (min_version is None or ours >= key(min_version)) and (max_version is None or ours <= key(max_version))


def _on_cpus() -> None:
    """The tests take a rank's number for a device that tensors can be on, and for DistributedDataParallel's, which they
    compare with: on CPUs there is none of that number. They gather tensors without a dimension, which Gloo refuses."""
    import torch.distributed as dist

    def gather_into(target: Any, tensor: Any, *more: Any, **named: Any) -> Any:
        return dist.all_gather_into_tensor(target, tensor.reshape(-1), *more, **named)

    importlib.import_module("runtime.comm").all_gather_into_tensor = gather_into
    importlib.import_module("runtime.accelerator").Accelerator.current_device = lambda _accelerator: "cpu"
    from torch.nn.parallel import DistributedDataParallel

    begin = DistributedDataParallel.__init__

    def without_devices(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, **more: Any) -> None:
        begin(self, module, **more)

    DistributedDataParallel.__init__ = without_devices  # type: ignore[method-assign]


def _no_file(*_given: Any) -> str:
    """Watched by the tests of loading without optimizer states: that nobody asks for it."""
    raise NotImplementedError("zerotop has no file for a rank's optimizer states alone")


HELPERS: dict[str, dict[str, Any]] = {
    # Versions from which on they run bf16; CPUs compute in it, too.
    "deepspeed.git_version_info": {
        "torch_info": {"version": "2.0", "cuda_version": "12.0", "hip_version": "0.0", "nccl_version": "2.20"}
    },
    "deepspeed.runtime.swap_tensor": {"MIN_SWAPPABLE_BYTES": 2**20},
    "deepspeed.utils.torch": {"required_torch_version": required_torch_version},
}
"""What the tests themselves are made with."""

_import = builtins.__import__


def _import_what_is_there(
    name: str,
    globals: dict[str, Any] | None = None,
    locals: dict[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """`from deepspeed.X import a, b` at the top of a test file: what X has no name for stands for itself."""
    module = _import(name, globals, locals, fromlist, level)
    at_top = globals is not None and locals is globals and "/tests/unit/" in str(globals.get("__file__"))
    if at_top and fromlist and name.partition(".")[0] == "deepspeed":
        for lacking in (wanted for wanted in fromlist if not hasattr(module, wanted)):
            setattr(module, lacking, type(lacking, (Lacking,), {"path": f"{name}.{lacking}"}))
    return module


def starmapstar(calls: Any) -> list[Any]:
    """multiprocessing's own, for workers of a pool: what is no Exception (pytest's failures are not) would end the
    worker, and whoever waits for its answer would wait for ever."""
    try:
        return list(itertools.starmap(calls[0], calls[1]))
    except Exception:
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


starmapstar.__module__ = "multiprocessing.pool"
multiprocessing.pool.starmapstar = starmapstar  # type: ignore[attr-defined]
sys.meta_path.insert(0, Shim())
# Each test starts ranks anew, from a server of forks that has imported what all of them import.
multiprocessing.set_forkserver_preload(["zerotop_preloaded"])
builtins.__import__ = _import_what_is_there
