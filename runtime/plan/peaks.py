"""Peak throughput of GPUs by the name that the driver gives them, for MFU. Torch-free.

Dense figures (without sparsity) in TFLOPS from NVIDIA's data sheets and architecture whitepapers; 16-bit products
accumulate in fp32. Data sheets of GPUs with sparsity state twice the dense figure. What a GPU reaches in practice is
less: its power limit lowers clocks.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense TFLOPS of one GPU. None: it has no units for this type."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    source: str


_AMPERE, _HOPPER = "A100 data sheet", "H100 data sheet"
_TABLE: tuple[tuple[str, Peak], ...] = (
    (r"B200", Peak(2250, 2250, 1125, 75, "HGX B200 data sheet")),
    (r"H200.*NVL", Peak(835, 835, 417, 60, "H200 NVL data sheet")),
    (r"H200", Peak(989, 989, 494, 67, "H200 data sheet")),
    (r"H100.*NVL", Peak(835, 835, 417, 60, "H100 NVL data sheet")),
    (r"H100.*PCIe", Peak(756, 756, 378, 51, _HOPPER)),
    (r"H100", Peak(989, 989, 494, 67, _HOPPER)),
    (r"A100", Peak(312, 312, 156, 19.5, _AMPERE)),
    (r"L40S", Peak(362, 362, 183, 91.6, "L40S data sheet")),
    (r"L4", Peak(121, 121, 60, 30.3, "L4 data sheet")),
    (r"A10", Peak(125, 125, 62.5, 31.2, "A10 data sheet")),
    (r"RTX A6000|A6000", Peak(154.8, 154.8, 77.4, 38.7, "RTX A6000 data sheet")),
    (r"RTX 5090", Peak(209.5, 209.5, 104.8, 104.8, "RTX Blackwell whitepaper")),
    (r"RTX 4090", Peak(165.2, 165.2, 82.6, 82.6, "Ada whitepaper")),
    (r"RTX 3090", Peak(71, 71, 35.6, 35.6, "GA102 whitepaper")),
    (r"V100.*PCIE", Peak(None, 112, None, 14, "V100 data sheet")),
    (r"V100", Peak(None, 125, None, 15.7, "V100 data sheet")),
    (r"T4", Peak(None, 65, None, 8.1, "T4 data sheet")),
)
"""(pattern of a whole word of the name, figures); the first that matches counts."""
_OTHERS = re.compile(r"\b(Ti|SUPER|Laptop|Mobile|D|Max-Q|MIG)\b", re.IGNORECASE)
"""Words of variants with other figures, and of slices of a GPU."""
KNOWN = ("A100", "H100 SXM", "H100 PCIe", "H100 NVL", "H200", "H200 NVL", "B200", "L4", "L40S", "A10", "A6000",
         "RTX 3090", "RTX 4090", "RTX 5090", "V100", "V100 PCIe", "T4")  # fmt: skip
"""Names for people, as `zerotop plan --gpu` takes them."""


def peak_of(device_name: str) -> Peak | None:
    """The figures of a GPU, by the driver's name ("NVIDIA H100 80GB HBM3") or a short one ("H100"); None if it is not
    in the table."""
    if _OTHERS.search(device_name):
        return None
    for pattern, peak in _TABLE:
        if re.search(rf"\b(?:{pattern})\b", device_name, re.IGNORECASE):
            return peak
    return None


def peak_tflops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Dense TFLOPS of one device of that name; None if it is not known, or has no units for `precision` ("bf16", "fp16"
    or "fp32"). tf32: whether products of fp32 run in TF32."""
    peak = peak_of(device_name)
    if peak is None:
        return None
    if precision == "fp32":
        return peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32
    return peak.bf16 if precision == "bf16" else peak.fp16
