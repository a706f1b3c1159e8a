"""`cross_entropy.cross_entropy` as two Triton kernels, which read logits as they were computed.

Neither fp32 logits nor their exponentials are ever in memory, and their gradient takes their place.

Letters: see `megatron_vl.ops.cross_entropy`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from megatron.core import parallel_state

from megatron_vl.ops.cross_entropy import padding_here

_BLOCK, _WARPS = 8192, 16


@triton.jit
def _read(logits, label, out, count, width, stride, first, block: tl.constexpr):
    """One program a position: the largest of its `width` words' logits, the sum of exponentials
    below it, and the label's logit, 0 where another rank has it. `out` is [3, count]."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    largest = float("-inf")
    total = 0.0
    for begin in range(0, width, block):
        column = begin + tl.arange(0, block)
        x = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), axis=0)
        largest = above
    word = tl.load(label + row) - first
    here = (word >= 0) & (word < width)
    said = tl.load(start + tl.where(here, word, 0), mask=here, other=0.0).to(tl.float32)
    tl.store(out + row, largest)
    tl.store(out + count + row, total)
    tl.store(out + 2 * count + row, said)


@triton.jit
def _write(
    logits, label, normalizer, of_loss, width, columns, stride, first, block: tl.constexpr
):
    """One program a position: (softmax - 1 at the label) * of_loss over the logits, 0 from `width`
    to `columns`."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    word = tl.load(label + row) - first
    below = tl.load(normalizer + row)
    factor = tl.load(of_loss + row)
    for begin in range(0, columns, block):
        column = begin + tl.arange(0, block)
        x = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - below) - tl.where(column == word, 1.0, 0.0)) * factor
        tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_cV, label_c, padding):
        logits_cV = logits_cV.contiguous()
        count, columns = logits_cV.shape
        width = columns - padding_here(columns, padding)
        first = parallel_state.get_tensor_model_parallel_rank() * columns
        found = torch.empty((3, count), dtype=torch.float32, device=logits_cV.device)
        if count:
            _read[(count,)](logits_cV, label_c, found, count, width, columns, first, block=_BLOCK,
                            num_warps=_WARPS)
        largest_c, rest_2c = found[0], found[1:]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            mine_c = largest_c.clone()
            torch.distributed.all_reduce(largest_c, torch.distributed.ReduceOp.MAX, group=group)
            rest_2c[0] *= torch.exp(mine_c - largest_c)
            torch.distributed.all_reduce(rest_2c, group=group)
        normalizer_c = largest_c + rest_2c[0].log()
        ctx.save_for_backward(logits_cV, label_c, normalizer_c)
        ctx.width, ctx.first = width, first
        return normalizer_c - rest_2c[1]

    @staticmethod
    def backward(ctx, of_loss_c):
        logits_cV, label_c, normalizer_c = ctx.saved_tensors
        count, columns = logits_cV.shape
        if count:
            _write[(count,)](logits_cV, label_c, normalizer_c, of_loss_c.contiguous(), ctx.width,
                             columns, columns, ctx.first, block=_BLOCK, num_warps=_WARPS)
        return logits_cV, None, None


def cross_entropy(logits_cV: torch.Tensor, label_c: torch.Tensor, padding: int) -> torch.Tensor:
    """See `megatron_vl.ops.cross_entropy.cross_entropy`; overwrites the logits in backward."""
    return _CrossEntropy.apply(logits_cV, label_c, padding)
