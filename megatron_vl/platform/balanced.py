"""How many tokens experts get on a device without numbers: every expert as many.

Letters: t tokens of this rank, E experts.
"""

from __future__ import annotations

import functools

import torch


def install_balanced() -> torch.library.Library:
    """Tell Megatron-Core's dispatcher the host's numbers, which it would read from the device.

    Tokens take the experts in turn, those of all ranks as those of this one; an expert takes no
    more of them than its capacity. Not to be repeated.

    Returns:
        torch.library's registration, which ends with the object.
    """
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import get_capacity

    kind = token_dispatcher.MoEAlltoAllTokenDispatcher
    preprocess, permute = kind.preprocess, token_dispatcher.permute
    gather = token_dispatcher.gather_from_sequence_parallel_region
    number = 0  # of tokens that a permutation takes, of each as often as it goes to an expert

    @functools.wraps(preprocess)
    def preprocess_balanced(self, routing_map):
        t, experts = routing_map.shape
        choices, factor = t * self.config.moe_router_topk, self.config.moe_expert_capacity_factor
        taken_tE = torch.zeros(t, experts, dtype=torch.bool)
        chosen = torch.arange(choices).view(t, -1) % experts
        taken_tE.scatter_(1, chosen, True)
        if factor is not None:
            taken_tE &= taken_tE.cumsum(0) <= get_capacity(choices, experts, factor)
        return preprocess(self, taken_tE)

    @functools.wraps(gather)
    def gather_alike(input_, *args, group=None, **more):
        if input_.device.type == "cpu":
            return input_.repeat(group.size())
        return gather(input_, *args, group=group, **more)

    @functools.wraps(permute)
    def permute_known(*args, num_out_tokens=None, **more):
        nonlocal number
        number = int(num_out_tokens)
        return permute(*args, num_out_tokens=num_out_tokens, **more)

    kind.preprocess = preprocess_balanced
    token_dispatcher.gather_from_sequence_parallel_region = gather_alike
    token_dispatcher.permute = permute_known
    library = torch.library.Library("aten", "IMPL")
    library.impl("masked_select", lambda input, mask: input.new_empty(number), "Meta")
    return library
