"""Tensors of which only the direction of each row counts, as of a normalised head: read and written
by rows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from megatron_vl.weights.dtypes import FLOAT32, cast, numbers
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.map import WeightMap, listed

if TYPE_CHECKING:
    from megatron_vl.weights.convert import Source

ROWS = 4096  # read at a time
LOOKED_AT = 256  # rows that tell whether a tensor is normalised
LEAST = 1e-12  # a shorter row is divided by this, as by torch.nn.functional.normalize
TOLERANCE = 2**-7  # of 16-bit rows' lengths


def normalize_rows(tensor: TensorAt) -> None:
    """Divides every row of a matrix in a file by its length, a few megabytes at a time."""
    height, width = tensor.shape
    with tensor.path.open("r+b") as file:
        for row in range(0, height, ROWS):
            bits = tensor.read(file.fileno(), (row, 0), (min(ROWS, height - row), width))
            rows = numbers(bits, tensor.dtype)
            rows /= np.maximum(_lengths(rows), LEAST)
            unit = cast(rows.astype("f4").view("u4"), FLOAT32, tensor.dtype)
            tensor.write(file.fileno(), row, [np.ascontiguousarray(unit)])


def told_normalized(source: Source, weights: WeightMap) -> str:
    """What to say of tensors of a checkpoint whose rows have length 1 already, though only their
    directions count; empty of others, and where no weights are there."""
    found = []
    for stored in source.inventory if source.tensors else ():
        piece = stored.pieces[0]
        first = piece.key in weights.directions and not any((*piece.start, *piece.at))
        if first and _has_unit_rows(source.tensors[stored.id]):
            found.append(piece.key)
    if not found:
        return ""
    return (
        f"the rows of {listed(found)} have length 1, as in a form for inference; the model "
        f"computes the same, but training starts from other numbers than the published ones"
    )


def _has_unit_rows(tensor: TensorAt) -> bool:
    """By the first of them."""
    shape = (min(LOOKED_AT, tensor.shape[0]), tensor.shape[1])
    with contextlib.ExitStack() as stack:
        file = None
        if tensor.loaded is None:
            file = stack.enter_context(tensor.path.open("rb")).fileno()
        rows = numbers(tensor.read(file, (0, 0), shape), tensor.dtype)
    return bool((np.abs(_lengths(rows) - 1) < TOLERANCE).all())


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1, keepdims=True)
