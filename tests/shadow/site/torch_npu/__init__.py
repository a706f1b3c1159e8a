"""torch_npu over the shadow device, for tests: where this folder is on the path, it is installed.

`import torch` loads it by its entry point, as it does the vendor's. It has the vendor's names, as
far as this project and Megatron-Core could ask for them, and none that the vendor's lacks. What it
refuses, and the names of the cards, are the vendor's too. Of its operators it has those that the
project calls.

SHADOW_NPU=NAME is what the card is called; empty, there is none. SHADOW_NPU=broken stands for a
torch_npu whose CANN is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

if os.environ.get("SHADOW_NPU") == "broken":
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

sys.path.append(str(Path(__file__).resolve().parents[3]))

from shadow import device

from torch_npu import npu
from torch_npu.operators import (
    npu_fast_gelu,
    npu_fusion_attention,
    npu_gelu,
    npu_rms_norm,
    npu_rotary_mul,
    npu_swiglu,
)

__all__ = [
    "npu_fast_gelu", "npu_fusion_attention", "npu_gelu", "npu_rms_norm", "npu_rotary_mul",
    "npu_swiglu",
]

device.register(npu)
npu.refuse_bitwise_reductions()
torch.npu.config = npu.Config()
if os.environ.get("TORCH_TRANSFER_TO_NPU") == "1":
    import torch_npu.contrib.transfer_to_npu  # noqa: F401


def _autoload() -> None:
    """The entry point; importing has done it."""
