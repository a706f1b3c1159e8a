"""Sums that a vendor's collectives do not compute: of float64, and means."""

from __future__ import annotations

import functools

import torch


def install_reductions(device_type: str) -> None:
    """Let all_reduce take float64 and AVG on devices of this type. Not to be repeated.

    HCCL reduces no float64, though it gathers it, and no AVG; so ranks gather each other's few
    numbers and each reduces them itself, as exactly as it was asked to.
    """
    distributed = torch.distributed
    reduce = distributed.all_reduce
    of_gathered = {distributed.ReduceOp.SUM: torch.sum, distributed.ReduceOp.MAX: torch.amax,
                   distributed.ReduceOp.MIN: torch.amin}

    @functools.wraps(reduce)
    def all_reduce(tensor, op=distributed.ReduceOp.SUM, group=None, async_op=False):
        if tensor.device.type != device_type:
            return reduce(tensor, op, group, async_op)
        if op == distributed.ReduceOp.AVG:
            assert not async_op
            all_reduce(tensor, group=group)
            tensor /= distributed.get_world_size(group)
        elif tensor.dtype == torch.float64:
            assert not async_op
            mine = tensor.detach().reshape(1, -1)
            ranks = mine.new_empty(distributed.get_world_size(group), mine.shape[1])
            distributed.all_gather_into_tensor(ranks, mine, group=group)
            tensor.copy_(of_gathered[op](ranks, 0).view_as(tensor))
        else:
            return reduce(tensor, op, group, async_op)

    distributed.all_reduce = distributed.distributed_c10d.all_reduce = all_reduce
