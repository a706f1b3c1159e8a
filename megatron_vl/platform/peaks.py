"""What devices can do at most, by the names their makers give them; none of it measured here."""

from __future__ import annotations

import re

# Dense bf16 products with fp32 sums, in 10^12 FLOPs a second, as the makers' data sheets say, of a
# sheet's figure with sparsity the half. The first pattern that is a word of the name counts.
# Of Ascend's there is no sheet: they are the matrix units' in Huawei's torchtitan-npu, and of a
# name without its variant what verl and VeOmni count with, which is too much for a B3 or B4.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L20", 119.5),
    ("RTX 4090 D", 147.0),
    ("RTX 4090", 165.2),
    ("RTX 4080", 97.5),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    (r"Ascend910B1\w*", 373.9),
    (r"Ascend910B2\w*", 354.0),
    (r"Ascend910B3\w*", 294.9),
    (r"Ascend910B4\w*", 245.8),
    (r"Ascend910_93\w*", 354.0),
    (r"Ascend950PR\w*", 432.0),
    (r"Ascend950DT\w*", 486.0),
    (r"Ascend910B\w*", 354.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in 10^12 FLOPs a second; None of one that is not known."""
    return next(
        (peak for name, peak in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)), None
    )
