"""What a process really loads. The import-linter contracts read the source; these ask sys.modules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.waiting import patient

TRAINER_ONLY = {"torch", "numpy", "safetensors", "tokenizers", "transformers", "deepspeed"}
MONITOR_ONLY = {"zerotop", "textual", "textual_plotext", "plotext"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
names = []
for root in sys.argv[1:]:
    package = importlib.import_module(root)
    names.append(root)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), root + "."):
        # __main__ starts its program when imported; libzt_*.so are plain libraries that only look like modules
        # and zerotop.integrations is for the scripts of other trainers, which it imports
        if not found.name.endswith(".__main__") and ".libzt_" not in found.name and ".integrations" not in found.name:
            importlib.import_module(found.name)
            names.append(found.name)
print(json.dumps({"imported": names, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def import_all(tmp_path: Path, *roots: str) -> tuple[set[str], set[str]]:
    """Import the roots and every module below them in a fresh process; (modules imported, top-level names loaded)."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, *roots],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patient(90),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return set(answer["imported"]), set(answer["loaded"])


def test_no_module_of_the_monitor_loads_torch(tmp_path: Path) -> None:
    imported, loaded = import_all(tmp_path, "zerotop")
    assert {"zerotop.cli", "zerotop.hub", "zerotop.tui", "zerotop.supervise.supervisor"} <= imported
    assert not any(name.startswith("zerotop.integrations") for name in imported)
    assert not loaded & TRAINER_ONLY


@pytest.mark.parametrize(
    "root", ["runtime.wire", "runtime.config", "runtime.plan", "runtime.native", "runtime.host.cores"]
)
def test_what_both_sides_share_loads_neither_torch_nor_textual(tmp_path: Path, root: str) -> None:
    imported, loaded = import_all(tmp_path, root)
    assert root in imported
    assert not loaded & (TRAINER_ONLY | MONITOR_ONLY)


def test_no_module_of_the_trainer_loads_the_monitor(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    imported, loaded = import_all(tmp_path, "runtime")
    assert {"runtime.engine", "runtime.trainer.train", "runtime.zero"} <= imported
    assert "torch" in loaded
    assert not loaded & MONITOR_ONLY


def test_importing_runtime_alone_loads_nothing_else(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import runtime; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    new = set(ast.literal_eval(done.stdout))
    assert "runtime" in new and "runtime.engine" not in new
    assert not {name.partition(".")[0] for name in new} & (TRAINER_ONLY | MONITOR_ONLY | {"pydantic", "zmq"})


def test_an_unknown_name_of_runtime_is_an_attribute_error() -> None:
    import runtime

    with pytest.raises(AttributeError, match="'initialise'"):
        runtime.initialise  # noqa: B018
    assert runtime.__version__
    assert "initialize" in dir(runtime)


@pytest.mark.parametrize(("folder", "name"), [("themes", "dark.toml"), ("examples", "quickstart.json")])
def test_data_files_are_found_where_the_package_is_installed(tmp_path: Path, folder: str, name: str) -> None:
    code = f"from importlib.resources import files; print((files('zerotop') / '{folder}' / '{name}').read_text())"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nafter adding a file to {folder}/, run `make install`"
    source = ROOT / folder / name
    assert done.stdout.rstrip("\n") == source.read_text().rstrip("\n"), "an old copy is installed: run `make install`"
