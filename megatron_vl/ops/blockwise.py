"""The forms in which frozen weights can be kept in blocks, and what they take; no torch."""

from __future__ import annotations

BLOCK = 64  # values of the flattened weight that share a scale
BITS = {"nf4": 4, "int8": 8}  # of a value's code, by the name of the form
FORMS = tuple(BITS)
SCALE_BYTES = 4  # of a block's largest magnitude, in fp32


def quantized_bytes(numel: int, form: str) -> int:
    """Bytes of the codes and the scales of a weight of `numel` values."""
    return -(-numel * BITS[form] // 8) + -(-numel // BLOCK) * SCALE_BYTES
