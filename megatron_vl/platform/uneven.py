"""Megatron-Core's collectives over parts of different length, for gloo.

Ranks that share an expert (ETP) pass their tokens to one another, and each has as many as its
routers sent there. NCCL takes parts of different length; gloo takes none.
"""

from __future__ import annotations

import torch


def install_uneven() -> None:
    """Let gloo gather and scatter such parts along the first dimension. Not to be repeated."""
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        ranks = group.size()
        output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
        torch.distributed.all_to_all_single(
            output, torch.cat([input_] * ranks), list(output_split_sizes), [len(input_)] * ranks,
            group=group,
        )
        return output

    def scatter_sums(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(list(input_split_sizes))[group.rank()].clone()

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = scatter_sums
