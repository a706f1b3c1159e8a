"""Who of the ranks that share a row encodes which of its images and videos.

Context-parallel ranks divide a microbatch's media among them, and under vit-data-parallel so do
tensor-parallel ranks, each then with a whole vision tower: no matrix is cut, nothing is sent within
a layer, and a rank computes 1/TP of the FLOPs, as evenly as whole images can be dealt out. The
embeddings are gathered once. The price: every rank holds the whole tower's weights.

Letters: M media tokens of a microbatch, m those of a rank, E width.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed

from megatron_vl.parallel import Layout
from megatron_vl.platform import current_device


class MediaShare:
    """This rank's part of a microbatch's media."""

    def __init__(self, layout: Layout):
        if layout.vit_data_parallel:
            self.group = parallel_state.get_tensor_and_context_parallel_group()
        else:
            self.group = parallel_state.get_context_parallel_group()
        self.size, self.rank = self.group.size(), self.group.rank()

    def mine(self, costs: list[int]) -> list[int]:
        """The media that this rank encodes, of a microbatch's, by what each costs."""
        return deal(costs, self.size)[self.rank]

    def gather(self, mine_mE: torch.Tensor, mine: list[int], tokens: list[int]) -> torch.Tensor:
        """All embeddings [M, E] on every rank.

        Args:
            mine_mE: of the media `mine`, one after the other.
            tokens: of each of the microbatch's media.
        """
        if self.size == 1:
            return mine_mE
        places = torch.arange(sum(tokens), device=mine_mE.device).split(tokens)
        placed = mine_mE.new_zeros(sum(tokens), mine_mE.shape[1])
        if mine:
            placed = placed.index_put((torch.cat([places[i] for i in mine]),), mine_mE)
        else:
            placed = placed + mine_mE.sum(0)  # of nothing: keeps the rank in the graph
        return _Gather.apply(placed, self.group)


def deal(costs: list[int], parts: int) -> list[list[int]]:
    """Indices for each part: the largest first, each to the part that has least so far.

    The largest part is within 4/3 of the best possible (Graham 1969, "Bounds on multiprocessing
    timing anomalies").
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = loads.index(min(loads))
        dealt[part].append(index)
        loads[part] += costs[index]
    return [sorted(one) for one in dealt]


def loads(costs: list[int], parts: int) -> list[int]:
    """What each part's indices, as `deal` gives them, cost together."""
    return [sum(costs[i] for i in one) for one in deal(costs, parts)]


class _Gather(torch.autograd.Function):
    """The sum over the ranks that share the media; backward, over those with other tokens.

    Context-parallel ranks hold each the gradient of their own tokens' uses; tensor-parallel ranks
    all hold the same.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, group) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _summed(gradient, parallel_state.get_context_parallel_group()), None


def _summed(x: torch.Tensor, group) -> torch.Tensor:
    x = x.clone()
    if group.size() > 1:
        distributed.all_reduce(x, group=group)
    return x


# ---- a tower that tensor parallelism does not cut ------------------------------------------------


def vision_groups(layout: Layout) -> ProcessGroupCollection:
    """The process groups of the vision tower's layers.

    Every rank of the job calls it, whether it has a tower or not, and as often as the others: from
    torch 2.14 on it counts groups, of which the number is part of the next one's name.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if layout.vit_data_parallel:
        me = distributed.get_rank()
        groups.tp = distributed.new_group([me], use_local_synchronization=True)
    return groups


def make_whole(tower: torch.nn.Module) -> None:
    """The tower's weights alike on all tensor-parallel ranks, and known as copies of one another.

    Megatron-Core's layers mark their weights as shards, of which the gradient norm would count each
    rank's; and they start from random numbers of each rank's own. What torch made of the tower is
    still on the host then, where NCCL sends nothing from.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in tower.to(current_device()).parameters():
        parameter.tensor_model_parallel = False
        distributed.broadcast(
            parameter.data, distributed.get_global_rank(group, 0), group=group
        )


def sum_whole(tower: torch.nn.Module, attribute: str) -> None:
    """Adds up an attribute (`main_grad`) over tensor-parallel ranks: each saw other images."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [getattr(parameter, attribute, None) for parameter in tower.parameters()]
    under_way = [distributed.all_reduce(part, group=group, async_op=True)
                 for part in parts if part is not None]  # a frozen weight has none
    for one in under_way:
        one.wait()


def mark_copies(sharded_state_dict: dict) -> dict:
    """Says of a tower's tensors, to be saved, that tensor-parallel ranks hold copies of one."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for tensor in nested_values(sharded_state_dict):
        first, _, last = tensor.replica_id
        tensor.replica_id = (first, rank, last)
    return sharded_state_dict
