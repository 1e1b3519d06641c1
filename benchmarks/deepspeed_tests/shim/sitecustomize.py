"""For processes of DeepSpeed's own tests, children too: `deepspeed` and all below it is zerotop's `runtime`.

DeepSpeed's test files import everything that any test of theirs needs. So that the others can run, what zerotop lacks
is there as a name, and using it raises NotImplementedError.
"""

from __future__ import annotations

import importlib
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
        for name in IMPORTED.get(fullname, ()):
            if not hasattr(module, name):
                setattr(module, name, type(name, (Lacking,), {"path": f"{fullname}.{name}"}))
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


def _as_list(groups: Any, *_sizes: Any) -> list[Any]:
    return [groups] if isinstance(groups, dict) else list(groups)


IMPORTED = {"deepspeed.checkpoint.utils": ("get_model_ckpt_name_for_rank",)}
"""Names that modules of ours lack and whole test files import for one of their tests: of DeepSpeed's own files."""

HELPERS: dict[str, dict[str, Any]] = {
    "deepspeed.utils.torch": {"required_torch_version": required_torch_version},
    # Of models without experts, which those of the tests are that run here.
    "deepspeed.moe.utils": {"split_params_into_different_moe_groups_for_optimizer": _as_list},
}
"""What the tests themselves are made with."""

sys.meta_path.insert(0, Shim())
