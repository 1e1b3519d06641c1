"""A fake libnvidia-ml.so.1, built by the C compiler, whose GPUs do what a control file says (see fake_nvml.c)."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pynvml
import pytest

NOT_SUPPORTED, NO_PERMISSION, GPU_IS_LOST = 3, 4, 15
_SOURCE = Path(__file__).with_name("fake_nvml.c")
_serials = itertools.count(1)


class FakeNvml:
    """The library in `folder`, and what its GPUs do. Each change is seen by the next call of every process that uses
    it. Skips the test where there is no C compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler: the fake libnvidia-ml.so.1 can't be built")
        self.folder = folder
        self.control = folder / "gpus"
        self._library = folder / "libnvidia-ml.so.1"
        self._lines: list[str] = []
        words = [*compiler.split(), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*words, str(_SOURCE), "-o", str(self._library)], check=True)
        self._write()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process finds this library instead of the driver's."""
        path = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(path), "FAKE_NVML": str(self.control)}

    def binding(self) -> ModuleType:
        """A pynvml of its own that uses this library; FAKE_NVML must be set in this process."""
        assert pynvml.__spec__ is not None and pynvml.__spec__.loader is not None
        module = importlib.util.module_from_spec(pynvml.__spec__)
        with patch.dict(sys.modules, {pynvml.__name__: module}):  # it looks itself up there to make its error classes
            pynvml.__spec__.loader.exec_module(module)
        module.nvmlLib = ctypes.CDLL(str(self._library))  # type: ignore[attr-defined]
        return module

    def gpus(self, count: int) -> None:
        """How many there are; 8 at first."""
        self._add(f"gpus {count}")

    def no_driver(self) -> None:
        """nvmlInit fails."""
        self._add("driver missing")

    def set(self, gpu: int | str, **values: float | str) -> None:
        """Set values of a GPU, or of all ("*"): the keys in fake_nvml.c."""
        self._add(*(f"{gpu} {key} {value}" for key, value in values.items()))

    def fail(self, gpu: int | str, function: str, code: int) -> None:
        """Let a function answer an error."""
        self._add(f"{gpu} fail {function} {code}")

    def hang(self, gpu: int | str, function: str, seconds: float) -> None:
        """Let a function take `seconds`."""
        self._add(f"{gpu} hang {function} {seconds}")

    def xid(self, gpu: int, number: int) -> None:
        """Raise an XID error."""
        self._add(f"{gpu} xid {number} {next(_serials)}")

    def reset(self) -> None:
        """Eight healthy GPUs again."""
        self._lines.clear()
        self._write()

    def _add(self, *lines: str) -> None:
        self._lines += lines
        self._write()

    def _write(self) -> None:
        new = self.control.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in self._lines))
        new.replace(self.control)
