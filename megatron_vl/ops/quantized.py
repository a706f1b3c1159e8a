"""Frozen weights in 4 or 8 bits a value, whole again only while they are used.

A weight is flattened and cut into blocks of 64 values. Of each block its largest magnitude is kept
in fp32, and of each value the number of the level nearest to it over that magnitude: a code.

    nf4   16 levels, the quantiles of a normal distribution (QLoRA, arXiv 2305.14314); two codes a
          byte, the first in the upper half. Codes, scales and values are bitsandbytes'
          `quantize_4bit(quant_type="nf4", blocksize=64)`, bit for bit.
    int8  255 levels, k / 127. Values are those of bitsandbytes' `dequantize_blockwise` for these
          codes, scales and levels, bit for bit. Its `quantize_blockwise` rounds about one value in
          a thousand, near the middle of two levels, to the other one.

Letters: n values of a weight, c codes a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from megatron_vl.ops.blockwise import BITS, BLOCK, SPAN

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
INT8 = tuple(max(level, -127) / 127 for level in range(-128, 128))  # as many as a byte has values
LEVELS = {"nf4": NF4, "int8": INT8}


class QuantizedTensor(torch.Tensor):
    """A weight that is kept as codes, and is whole wherever an operation takes it.

    It has the shape, dtype and device of the whole weight. An operator of torch's that is given one
    gets the whole weight instead, which is freed with the operator's own inputs; what autograd
    saves for backward is this tensor, the codes alone. There is no gradient to it.

    Args:
        codes: uint8 [n / c].
        scales: float32 [n / 64], the largest magnitude of every block; the last may be shorter.
        form: one of `blockwise.FORMS`.
        shape, dtype: of the whole weight.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    form: str
    by_byte: torch.Tensor  # what every byte stands for, float32 [256, c]

    # A function of Python's is run as it is; its operators come to __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, scales: torch.Tensor, *, form: str, shape: torch.Size,
        dtype: torch.dtype,
    ) -> QuantizedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.form = codes, scales, form
        made.by_byte = _by_byte(form, codes.device)
        return made

    @classmethod
    def empty_like(cls, weight: torch.Tensor, form: str) -> QuantizedTensor:
        """Room for a weight like `weight`; `store_` fills it."""
        codes, numel, device = -(-weight.numel() * BITS[form] // 8), weight.numel(), weight.device
        return cls(
            torch.empty(codes, dtype=torch.uint8, device=device),
            torch.empty(-(-numel // BLOCK), dtype=torch.float32, device=device),
            form=form, shape=weight.shape, dtype=weight.dtype,
        )

    @torch.no_grad()
    def store_(self, weight: torch.Tensor) -> None:
        """Quantise a whole weight of this shape into this tensor.

        A block with a NaN or an infinity is NaN as a whole.
        """
        assert weight.shape == self.shape and weight.dtype == self.dtype
        flat, per_byte = weight.detach().reshape(-1), 8 // BITS[self.form]
        levels = _levels(self.form, self.device)
        bounds = (levels[:-1] + levels[1:]) / 2
        for start in range(0, flat.numel(), SPAN):
            part = flat[start : start + SPAN].float()
            count = part.numel()
            blocks = F.pad(part, (0, -count % BLOCK)).view(-1, BLOCK)
            scales = blocks.abs().amax(1)
            scales.masked_fill_(scales.isinf(), torch.nan)
            # Of a block of zeros too, whose scale stays zero.
            ratios = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
            codes = torch.bucketize(ratios, bounds, out_int32=True).view(-1)
            codes = codes[: count + count % per_byte].to(torch.uint8)
            if per_byte == 2:
                codes = codes[::2] << 4 | codes[1::2]
            at = start // per_byte
            self.codes[at : at + codes.numel()] = codes
            self.scales[start // BLOCK : start // BLOCK + scales.numel()] = scales

    @torch.no_grad()
    def dequantize(self) -> torch.Tensor:
        """The whole weight: a level times its block's scale, in fp32, rounded to the dtype."""
        whole = self.codes.new_empty(self.shape, dtype=self.dtype)
        flat, per_byte = whole.view(-1), 8 // BITS[self.form]
        for start in range(0, flat.numel(), SPAN):
            count = min(SPAN, flat.numel() - start)
            at, block = start // per_byte, start // BLOCK
            codes = self.codes[at : at + -(-count // per_byte)]
            values = self.by_byte.index_select(0, codes.int()).view(-1)[:count]
            full = count // BLOCK
            values[: full * BLOCK].view(-1, BLOCK).mul_(self.scales[block : block + full, None])
            if count % BLOCK:
                values[full * BLOCK :].mul_(self.scales[block + full])
            flat[start : start + count] = values
        return whole

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (one,) = args
            return cls(one.codes, one.scales, form=one.form, shape=one.shape, dtype=one.dtype)
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write to a quantised weight, which store_ alone does")
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form}, {list(self.shape)}, {self.dtype})"


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is in memory of a weight: itself, or its codes and scales."""
    return (weight.codes, weight.scales) if isinstance(weight, QuantizedTensor) else (weight,)


@cache
def _levels(form: str, device: torch.device) -> torch.Tensor:
    """float32, ascending."""
    return torch.tensor(LEVELS[form], dtype=torch.float32, device=device)


@cache
def _by_byte(form: str, device: torch.device) -> torch.Tensor:
    """float32 [256, c]."""
    levels = _levels(form, device)
    return levels[:, None] if BITS[form] == 8 else torch.cartesian_prod(levels, levels)
