"""Sums over ranks that a vendor's collectives do not compute."""

from __future__ import annotations

import functools

import torch


def install_reductions(device_type: str) -> None:
    """Let all_reduce take float64 on devices of this type. Not to be repeated.

    HCCL gathers float64 and reduces none. So ranks gather each other's few numbers, and each
    reduces them itself, in float64.
    """
    distributed = torch.distributed
    reduce = distributed.all_reduce
    of_gathered = {distributed.ReduceOp.SUM: torch.sum, distributed.ReduceOp.MAX: torch.amax,
                   distributed.ReduceOp.MIN: torch.amin}

    @functools.wraps(reduce)
    def all_reduce(tensor, op=distributed.ReduceOp.SUM, group=None, async_op=False):
        if tensor.device.type != device_type or tensor.dtype != torch.float64:
            return reduce(tensor, op, group, async_op)
        assert not async_op
        mine = tensor.reshape(1, -1)
        ranks = mine.new_empty(distributed.get_world_size(group), mine.shape[1])
        distributed.all_gather_into_tensor(ranks, mine, group=group)
        tensor.copy_(of_gathered[op](ranks, 0).view_as(tensor))

    distributed.all_reduce = distributed.distributed_c10d.all_reduce = all_reduce
