"""The number formats weights are stored in, as bits: no torch.

Arrays here are numpy's unsigned integers of the format's width. Copying needs no more, and numpy
knows all the numbers but bfloat16's, which are the upper halves of float32's.
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
# no finite number (IEEE 754).
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
    """The numbers in another format, rounded to the nearest, ties to even, as torch does."""
    if old == new:
        return bits
    wide = _float32(bits, old)
    if new == FLOAT32:
        return wide.view("u4")
    if new == FLOAT16:
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite
            return wide.astype("f2").view("u2")
    whole = wide.view("u4")
    rounded = (whole + (0x7FFF + ((whole >> 16) & 1))) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype("u2")


def _float32(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers as float32, which holds all of each format."""
    if dtype == BFLOAT16:
        return (bits.astype("u4") << 16).view("f4")
    return bits.view(f"f{dtype.itemsize}").astype("f4")


def numbers(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers as float64."""
    return _float32(bits, dtype).astype("f8")
