"""Weight gradients added to the fp32 buffer by the matrix product itself, without Apex.

Otherwise each is rounded to 16 bits, written, read again and added: more to move, and a rounding
a microbatch.
"""

from __future__ import annotations

import torch


def install_weight_gradient() -> None:
    """Give Megatron-Core `gradient_accumulation_fusion`, where Apex does not."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = AddedByTorch
        layers._grad_accum_fusion_available = True


class AddedByTorch:
    """Apex's module fused_weight_gradient_mlp_cuda.

    T tokens, I inputs, O outputs of a linear layer: main_grad [O, I] += gradient [T, O]^T x [T, I].
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(x: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor):
        if x.dtype == main_grad.dtype:
            main_grad.addmm_(gradient.t(), x)
        else:
            torch.addmm(main_grad, gradient.t(), x, out_dtype=main_grad.dtype, out=main_grad)

    @staticmethod
    def wgrad_gemm_accum_fp16(x: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor):
        main_grad.addmm_(gradient.t(), x)
