"""A linear layer of several experts as one product.

Letters: T tokens in the order of their experts, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def grouped_linear(
    x_TI: torch.Tensor, weights: Sequence[torch.Tensor], ends_E: torch.Tensor
) -> torch.Tensor:
    """Every expert's tokens times its weight, [T, O].

    Args:
        weights: [O, I] of each expert, in rows of a multiple of 16 bytes, as I and O both must be.
        ends_E: int32, where each expert's tokens end, on the device of `x_TI`; an expert may have
            none.
    """
    return _GroupedLinear.apply(x_TI, ends_E, *weights)


class _GroupedLinear(torch.autograd.Function):
    """Keeps the weights that there are, and stacks them again in backward.

    torch's own derivative would keep the stack, a copy of the weights of every layer.
    """

    @staticmethod
    def forward(ctx, x_TI, ends_E, *weights):
        trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x_TI if trained else None, ends_E, *weights)
        stacked_EIO = torch.stack(weights).transpose(1, 2)
        return _product(x_TI, stacked_EIO, ends_E)

    @staticmethod
    def backward(ctx, of_out_TO):
        x_TI, ends_E, *weights = ctx.saved_tensors
        of_out_TO = of_out_TO.contiguous()
        of_x_TI, of_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            of_x_TI = _product(of_out_TO, torch.stack(weights), ends_E)
        if x_TI is not None:
            of_weights = _weight_gradients(of_out_TO, x_TI, ends_E)
        return of_x_TI, None, *of_weights


def _product(x_TI, weight_EIO, ends_E):
    if not len(x_TI):  # kernels need not take what has no rows
        return x_TI.new_empty(0, weight_EIO.shape[-1])
    return F.grouped_mm(x_TI, weight_EIO, offs=ends_E)


def _weight_gradients(of_out_TO, x_TI, ends_E):
    """[O, I] of each expert, zeros of one without tokens."""
    if not len(x_TI):
        return x_TI.new_zeros(len(ends_E), of_out_TO.shape[1], x_TI.shape[1]).unbind()
    return F.grouped_mm(of_out_TO.t(), x_TI, offs=ends_E).unbind()
