"""A fake libcuda.so.1, built by the C compiler: a CUDA driver that starts, or fails to, as it is told (see
fake_cuda.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("fake_cuda.c")


class FakeCuda:
    """The library in `folder`. Skips the test where there is no C compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler: the fake libcuda.so.1 can't be built")
        self.folder = folder
        words = [*compiler.split(), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*words, str(_SOURCE), "-o", str(folder / "libcuda.so.1")], check=True)

    def environment(self, *, version: int = 13000, init: int = 0) -> dict[str, str]:
        """Variables with which a process finds this driver: of CUDA `version` (13000: 13.0), whose start returns the
        CUresult `init`."""
        path = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(path),
            "FAKE_CUDA_VERSION": str(version),
            "FAKE_CUDA_INIT": str(init),
        }
