"""The device's peak, by which MFU is measured, in the precision in which matrices are multiplied."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT

pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("matmul.fp32_precision = 'tf32'", "tf32"),
        ("matmul.fp32_precision = 'ieee'", "fp32"),
        ("matmul.allow_tf32 = True", "tf32"),
        ("matmul.allow_tf32 = False", "fp32"),
    ],
)
def test_the_peak_in_fp32_knows_tf32_however_it_was_set(setting: str, kind: str) -> None:
    """torch has two ways to set it, and reading the older one raises once the newer one was used."""
    program = (
        "import torch; from types import SimpleNamespace as N; from runtime.engine.efficiency import peak_flops\n"
        f"torch.backends.cuda.{setting}\n"
        "config = N(precision='fp32', zerotop=N(telemetry=N(peak_tflops=None)))\n"
        "print(peak_flops(config, torch.device('cuda'), 'NVIDIA H100 80GB HBM3')[1])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert f"TFLOPS {kind}," in found.stdout, found.stdout + found.stderr
