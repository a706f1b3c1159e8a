"""Megatron-Core's collectives over parts of different length, for gloo.

Ranks that share an expert (ETP) pass their tokens to one another, and each has as many as its
routers sent there. NCCL takes parts of different length; gloo takes none, and is given one after
the other.
"""

from __future__ import annotations

import torch

BLOCK = 128  # rows that are copied at a time, to be summed in place


def install_uneven() -> None:
    """Let gloo gather and scatter such parts along the first dimension. Not to be repeated."""
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
        parts = output.split(list(output_split_sizes))
        parts[group.rank()].copy_(input_)
        for rank, part in enumerate(parts):
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return output

    def scatter_sums(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        parts = input_.split(list(input_split_sizes))
        own = torch.empty_like(parts[group.rank()])
        for rank, part in enumerate(parts):
            for at in range(0, len(part), BLOCK):
                summed = part[at : at + BLOCK].clone()
                torch.distributed.reduce(summed, group=group, group_dst=rank)
                if rank == group.rank():
                    own[at : at + BLOCK] = summed
        return own

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = scatter_sums
