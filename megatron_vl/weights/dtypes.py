"""The number formats weights are stored in, as bits: no torch.

Arrays here are numpy's unsigned integers of the format's width. Copying needs no more; only a cast
asks torch what the numbers are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """A number format: its name is torch's."""

    name: str
    itemsize: int  # bytes

    @property
    def bits(self) -> np.dtype:
        """numpy's unsigned integer of this width."""
        return np.dtype(f"u{self.itemsize}")

    def __str__(self) -> str:
        return self.name


FLOAT32, FLOAT16, BFLOAT16 = DType("float32", 4), DType("float16", 2), DType("bfloat16", 2)
WEIGHTS = {dtype.name: dtype for dtype in (FLOAT32, FLOAT16, BFLOAT16)}  # that can be converted

# The infinities' bits. Everything from +Inf on up to the sign bit, and from -Inf on to the end, is
# no finite number (IEEE 754; bfloat16 is the upper half of float32).
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def not_finite(bits: np.ndarray, dtype: DType) -> int:
    """How many NaN or Inf are in an array of bits."""
    infinity, sign = _INFINITY[dtype.name], 1 << (8 * dtype.itemsize - 1)
    # Two sweeps for the largest take a fraction of looking at each element.
    if bits.size == 0 or (bits.view(f"i{dtype.itemsize}").max() < infinity
                          and bits.max() < infinity | sign):
        return 0
    return int(np.count_nonzero((bits & infinity) == infinity))


def cast(bits: np.ndarray, old: DType, new: DType) -> np.ndarray:
    """The numbers in another format, rounded as torch does."""
    if old == new:
        return bits
    # Imported here: torch takes seconds, and most conversions keep the format.
    import torch

    signed = torch.from_numpy(np.require(bits, requirements=("C", "W")).view(f"i{old.itemsize}"))
    numbers = signed.view(getattr(torch, old.name)).to(getattr(torch, new.name))
    return numbers.view(getattr(torch, f"int{8 * new.itemsize}")).numpy().view(new.bits)


def numbers(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers as float64."""
    if dtype == BFLOAT16:
        bits, dtype = bits.astype("u4") << 16, FLOAT32
    return bits.view(f"f{dtype.itemsize}").astype("f8")
