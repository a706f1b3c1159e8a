"""Elementwise operations and cross-entropy: plain torch, the reference, and kernels that equal it.

| operation | kernels, in the order in which they are tried |
|---|---|
| `rotary` | torch_npu's, Triton's |
| `swiglu` | torch_npu's, liger-kernel's, else Megatron-Core's, made by torch.compile |
| `quick_gelu` | torch_npu's, Triton's, with the bias |
| `gelu` | torch_npu's; elsewhere torch has one |
| `gelu_pytorch_tanh`, `silu` | torch has one |
| `rms_norm` | torch_npu's; elsewhere torch has one |
| `cross_entropy` | Triton's, of logits as they were computed |

The reference runs everywhere. A kernel runs on a device that gains by it, if what it is written
with is installed; torch_npu's are those of Ascend NPUs. torch.compile could make all of them, but
its wrappers cost the host a tenth of a millisecond a call, more than the kernels take.

Letters: I inner width; x is [..., I], or [..., 2 I] where it holds gate and value side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch.nn import functional as F

from megatron_vl.ops.rotary import rotate
from megatron_vl.platform import select_platform

REFERENCE = "torch"


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x * sigmoid(1.702 x), as CLIP's."""
    x = biased(x, bias)
    return x * torch.sigmoid(1.702 * x)


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.gelu(biased(x, bias))


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.gelu(biased(x, bias), approximate="tanh")


def silu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.silu(biased(x, bias))


def swiglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * value, [..., I] of [..., 2 I]."""
    gate, value = biased(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * value


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias


def _npu(operation: str) -> Callable[[], Callable]:
    def load() -> Callable:
        if select_platform().name != "npu":
            raise ImportError("no Ascend NPU")
        from megatron_vl.ops import fusion_npu

        return getattr(fusion_npu, operation)

    return load


def _triton(module: str, operation: str) -> Callable[[], Callable]:
    def load() -> Callable:
        if select_platform().name == "npu":
            raise ImportError("Triton's kernels here are not written for an NPU")
        return getattr(import_module(f"megatron_vl.ops.{module}"), operation)

    return load


def _cross_entropy() -> Callable:
    from megatron_vl.ops.cross_entropy import cross_entropy

    return cross_entropy


def _liger_swiglu() -> Callable:
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    def liger_swiglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = biased(x, bias)
        out = LigerFusedGateUpSiLUMulFunction.apply(x.reshape(-1, x.shape[-1]), False)
        return out.view(*x.shape[:-1], x.shape[-1] // 2)

    return liger_swiglu


def _compiled_swiglu() -> Callable:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return bias_swiglu_impl


# Of each operation, by their names: what gives it, in the order in which they are tried. A loader
# raises ImportError where what it needs is not installed.
OPERATIONS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rotary": {"npu": _npu("rotate"), "triton": _triton("rotary_triton", "rotate"),
               REFERENCE: lambda: rotate},
    "swiglu": {"npu": _npu("swiglu"), "liger": _liger_swiglu, "compiled": _compiled_swiglu,
               REFERENCE: lambda: swiglu},
    "quick_gelu": {"npu": _npu("quick_gelu"), "triton": _triton("activation_triton", "quick_gelu"),
                   REFERENCE: lambda: quick_gelu},
    "gelu": {"npu": _npu("gelu"), REFERENCE: lambda: gelu},
    "gelu_pytorch_tanh": {REFERENCE: lambda: gelu_tanh},
    "silu": {REFERENCE: lambda: silu},
    "rms_norm": {"npu": _npu("rms_norm"), REFERENCE: lambda: rms_norm},
    "cross_entropy": {"triton": _triton("cross_entropy_triton", "cross_entropy"),
                      REFERENCE: _cross_entropy},
}
# torch's own is another function on some device: on NPUs gelu is the form with tanh, whatever is
# asked for. There the kernel is no matter of speed.
NOT_TORCH_EVERYWHERE = ("gelu",)
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu")  # of a layer without a gate


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """Who computes an operation."""

    name: str
    function: Callable


@cache
def choose_kernel(operation: str, fused: bool) -> Kernel:
    """The first of an operation's kernels that is installed; its reference if not `fused`, where
    that is the same function on every device."""
    fused = fused or operation in NOT_TORCH_EVERYWHERE
    for name, load in OPERATIONS[operation].items():
        if fused or name == REFERENCE:
            try:
                return Kernel(name=name, function=load())
            except ImportError:
                continue
    raise AssertionError("the reference needs nothing but torch")
