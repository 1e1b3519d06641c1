"""The CUDA sources compile without a warning, no kernel spills, and the table of registers has every kernel."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest

from tests.harness import ROOT

OUTPUT = """
ptxas info    : Compiling entry function '_ZN2zt39_GLOBAL__N__ce_7_adam_cu_6e8274d812adamw_kernelINS_4Fp32ES2_Lb1EEEvNS0_5TableE' for 'sm_80'
ptxas info    : Function properties for _ZN2zt39_GLOBAL__N__ce_7_adam_cu_6e8274d812adamw_kernelINS_4Fp32ES2_Lb1EEEvNS0_5TableE
    {spills}
ptxas info    : Used 61 registers, used 0 barriers, 4024 bytes cmem[0], 16 bytes cmem[2]
ptxas info    : Compiling entry function '_ZN2zt39_GLOBAL__N__ce_7_adam_cu_6e8274d812adamw_kernelINS_4Bf16ENS_5NoOutELb0EEEvNS0_5TableE' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function '_ZN2zt39_GLOBAL__N__75_7_norm_cu_cf6fdbbb4foldENS0_5TableEPdS2_S2_' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 3464 bytes cmem[0]
"""  # noqa: E501


@pytest.fixture(scope="module")
def registers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_registers", ROOT / "tools/cuda_registers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_says_is_understood(registers: ModuleType) -> None:
    clean, spilling = (
        registers.parse(OUTPUT.format(spills=f"{stack} bytes stack frame, {n} bytes spill stores, 8 bytes spill loads"))
        for stack, n in ((0, 0), (16, 24))
    )
    assert [kernel.name for kernel in clean] == ["adamw fp32 to fp32, L2", "adamw bf16 to none", "fold"]
    assert [kernel.registers for kernel in clean] == [61, 40, 34]
    assert [(kernel.spill_bytes, kernel.stack_bytes) for kernel in spilling] == [(32, 16), (0, 0), (0, 0)]
    assert [registers.warps(n) for n in (32, 40, 64, 72, 128)] == [48, 48, 32, 24, 16]


def compiled(registers: ModuleType, architectures: list[str]) -> dict[str, int]:
    """Registers of each kernel on the last of `architectures`."""
    nvcc = registers.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    kernels, problems = registers.build(nvcc, architectures, min(4, os.cpu_count() or 1))
    assert not problems, "\n".join(problems)
    return {name: kernel.registers for name, kernel in kernels[architectures[-1]].items()}


def test_one_architecture_and_ptx_compile(registers: ModuleType) -> None:
    found = compiled(registers, ["90"])
    rows = (ROOT / "benchmarks/results/cuda-registers.md").read_text().splitlines()
    assert sorted(found) == sorted(
        row.split("|")[1].strip() for row in rows if row.startswith("| ") and "sm_" not in row
    )
    assert len(found) == 3 * 4 * 2 + 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_architecture_compiles(registers: ModuleType) -> None:
    assert len(compiled(registers, list(registers.ARCHITECTURES))) == 27
