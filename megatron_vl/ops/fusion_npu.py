"""The operations of `megatron_vl.ops.fusion` by torch_npu's kernels, for Ascend NPUs.

Their documentation is in Ascend/op-plugin, docs/zh/custom_APIs/torch_npu.
"""

from __future__ import annotations

import torch
import torch_npu

from megatron_vl.ops import fusion


def rotate(x_sbXH: torch.Tensor, cos_sb1R: torch.Tensor, sin_sb1R: torch.Tensor) -> torch.Tensor:
    """See `megatron_vl.ops.rotary.rotate`; the kernel wants an angle for each number of a head."""
    both = (torch.cat((one, one), dim=-1) for one in (cos_sb1R, sin_sb1R))
    return torch_npu.npu_rotary_mul(x_sbXH, *both)


def swiglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.swiglu`; the kernel takes no empty tensor."""
    if not x.numel():  # of an expert without tokens
        return fusion.swiglu(x, bias)
    return torch_npu.npu_swiglu(fusion.biased(x, bias).contiguous())


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.quick_gelu`. On the first Ascend 910, which the platform refuses,
    the kernel is another function."""
    return torch_npu.npu_fast_gelu(fusion.biased(x, bias))


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.gelu`."""
    return torch_npu.npu_gelu(fusion.biased(x, bias), approximate="none")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.rms_norm`."""
    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
