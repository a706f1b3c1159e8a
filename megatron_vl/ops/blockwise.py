"""The forms in which frozen weights can be kept in blocks, and what they take; no torch."""

from __future__ import annotations

BLOCK = 64  # values of the flattened weight that share a scale
BITS = {"nf4": 4, "int8": 8}  # of a value's code, by the name of the form
FORMS = tuple(BITS)
SCALE_BYTES = 4  # of a block's largest magnitude, in fp32
SPAN = 2**21  # values that are worked on at a time: temporaries take a few tens of MiB


def quantized_bytes(numel: int, form: str) -> int:
    """Bytes of the codes and the scales of a weight of `numel` values."""
    return -(-numel * BITS[form] // 8) + -(-numel // BLOCK) * SCALE_BYTES


def whole_bytes(numel: int, itemsize: int) -> int:
    """At most, while a weight of `numel` values is made whole: itself and, of a span, the values in
    fp32, with those of the span before, and the codes of two values each in 32 bits."""
    before = min(max(numel - SPAN, 0), SPAN)
    return numel * itemsize + min(numel, SPAN) * (4 + 2) + before * 4
