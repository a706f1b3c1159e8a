"""Tensors in memory, cut as another layout or the files of the model have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from megatron_vl.weights.map import Stored, WeightMap, whole_tensor
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
            read = tensors[op.source.id][box(op.start, op.read)]
            out[box(op.at, op.shape)] = read.T if op.turned else read
    return made


def to_files(tensors: Mapping[str, torch.Tensor], weights: WeightMap) -> dict[str, torch.Tensor]:
    """Published tensors as published files hold them, where the experts of a layer may be one."""
    import torch

    source = [whole_tensor(key, tuple(one.shape)) for key, one in tensors.items()]
    target = weights.hf_inventory()
    made = recut({one.id: tensors[one.name] for one in source}, source, target)
    files = {}
    for name, parts in groupby(target, key=attrgetter("tensor")):
        first, *_ = parts = list(parts)
        found = [made[one.id] for one in parts]
        files[name] = torch.stack(found) if first.of else found[0]
    return files


def from_files(tensors: Mapping[str, torch.Tensor], weights: WeightMap) -> dict[str, torch.Tensor]:
    """Tensors as files of the model hold them, each as it is published by itself.

    Raises:
        InputError: see `WeightMap.hf_inventory`.
    """
    source = weights.hf_inventory({("", "", name): tuple(one.shape)
                                   for name, one in tensors.items()})
    target = [whole_tensor(key, shape) for key, shape in weights.published().items()]
    held = {one.id: tensors[one.tensor][one.of[1]] if one.of else tensors[one.name]
            for one in source}
    return {name: tensor for (*_, name), tensor in recut(held, source, target).items()}
