"""Peak figures by the names that drivers report."""

from __future__ import annotations

import pytest

from runtime.plan.peaks import KNOWN, peak_of, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
    ],
)
def test_names_of_drivers(name: str, bf16: float) -> None:
    assert peak_tflops(name, "bf16") == bf16


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A10G", "NVIDIA L40", "NVIDIA A100X", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
     "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "x86_64", ""],
)  # fmt: skip
def test_others_are_not_taken_for_them(name: str) -> None:
    assert peak_of(name) is None


def test_precisions() -> None:
    assert peak_tflops("Tesla V100-SXM2-16GB", "fp16") == 125
    assert peak_tflops("Tesla V100-PCIE-16GB", "fp16") == 112
    assert peak_tflops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156
    assert peak_tflops("Tesla T4", "fp32", tf32=True) == 8.1


def test_short_names() -> None:
    assert all(peak_of(name) is not None for name in KNOWN)
    assert peak_of("h100") == peak_of("NVIDIA H100 80GB HBM3")
