"""Tensors in memory, cut for one number of TP ranks, as they are cut for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_vl.weights.map import Stored
from megatron_vl.weights.plan import make_plan
from megatron_vl.weights.rules import box

if TYPE_CHECKING:
    import torch

Id = tuple[str, str, str]  # of a `Stored`


def recut(
    tensors: Mapping[Id, torch.Tensor], source: Sequence[Stored], target: Sequence[Stored]
) -> dict[Id, torch.Tensor]:
    """What `target` asks for, from the `tensors` that `source` describes, in their dtype.

    Raises:
        InputError: the source does not hold all of it.
    """
    made = {}
    for one in make_plan(source, target).tensors:
        first = tensors[one.ops[0].source.id]
        out = made[one.target.id] = first.new_zeros(one.target.shape)
        for op in one.ops:
            out[box(op.at, op.shape)] = tensors[op.source.id][box(op.start, op.shape)]
    return made
