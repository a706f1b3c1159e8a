"""Megatron-Core's router of experts, with losses and a capacity in which padding counts nothing.

Letters: t tokens of this rank, E experts, n groups of tokens that are balanced by themselves.

The auxiliary loss of a layer is `E * sum_i f_i P_i`: f_i is the share of the group's choices that
fell on expert i, P_i the mean of its softmax over the group's tokens (Switch Transformer, arXiv
2101.03961, equations 4 to 6; as in Megatron-Core, all f_i sum to one whatever top-k is). It is 1
where experts have equal shares. The z-loss is the mean square of the logits' log-sum-exp (ST-MoE,
arXiv 2202.08906, equation 5).

A microbatch's losses are weighted by the divisor of its main loss, so a step minimizes the mean
over trained tokens (or samples) of main and auxiliary losses. Megatron-Core weights them by the
number of its tokens on a rank (0.16) or on all ranks (0.19): right where every token is trained,
and 0.16 on one rank alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_capacity,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter

from megatron_vl.models.common.routed_tokens import RoutedTokens


class BalancedRouter(TopKRouter):
    """A layer's router. `tokens` is the microbatch in work, which its layer sets.

    What it counts in training, since `take_counts`, stays on its device:

    Attributes:
        load_E: int64, tokens that chose each expert.
        dropped: int64 [], choices of experts that were full.
        losses: float64 [3], this rank's parts of weight x auxiliary loss, weight x z-loss, and the
            weights.
        batch_load_E: float32, of the step so far over all replicas, for global_aux_loss.
    """

    tokens: RoutedTokens | None = None

    def __init__(self, config, pg_collection=None, **more):
        super().__init__(config=config, pg_collection=pg_collection, **more)
        self.balance = config.balance
        for name, kind, shape in (
            ("load_E", torch.int64, (self.num_experts,)), ("dropped", torch.int64, ()),
            ("losses", torch.float64, (3,)), ("batch_load_E", torch.float32, (self.num_experts,)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind), persistent=False)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float [t, E] of tokens' experts, 0 elsewhere, and where they go, bool [t, E].

        Args:
            logits: [s, b, E].
            padding_mask: None; `tokens` say it.
        """
        logits_tE = logits.view(-1, self.num_experts)
        weights_tE, chosen_tE = topk_routing_with_score_function(
            logits_tE, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )
        if not self.training:
            return weights_tE, chosen_tE
        taken_tE = chosen_tE
        if self.balance.capacity_factor is not None:
            taken_tE = self._within_capacity(weights_tE, chosen_tE)
            weights_tE = weights_tE * taken_tE
        if self.layer_number not in self.tokens.counted:
            self.tokens.counted.add(self.layer_number)
            self._count(chosen_tE, taken_tE)
        # Layers that are computed again in backward have their gradient only then.
        if self.balance.has_loss and torch.is_grad_enabled():
            loss = self._loss(logits_tE, chosen_tE)
            weights_tE = MoEAuxLossAutoScaler.apply(weights_tE, self.tokens.weight * loss)
        return weights_tE, taken_tE

    def take_counts(self) -> torch.Tensor:
        """float64 [E + 4]: `load_E`, `dropped` and `losses`, which start again at 0."""
        counts = (self.load_E, self.dropped[None], self.losses)
        taken = torch.cat([one.double() for one in counts])
        for one in counts:
            one.zero_()
        return taken

    def _within_capacity(self, weights_tE, chosen_tE) -> torch.Tensor:
        """bool [t, E]: of the tokens that chose an expert, those of the largest weights, as many as
        it takes of this rank's; padding goes nowhere."""
        real_t1 = self.tokens.is_real_t[:, None]
        capacity = get_capacity(
            self.tokens.own * self.topk, self.num_experts, self.balance.capacity_factor
        )
        chosen_tE = chosen_tE & real_t1
        if capacity >= len(chosen_tE):
            return chosen_tE
        first_cE = (weights_tE * real_t1).topk(capacity, dim=0).indices
        return chosen_tE & torch.zeros_like(chosen_tE).scatter(0, first_cE, True)

    @torch.no_grad()
    def _count(self, chosen_tE, taken_tE) -> None:
        real_tE = chosen_tE & self.tokens.is_real_t[:, None]
        self.load_E += real_tE.sum(0)
        self.dropped += (real_tE & ~taken_tE).sum()

    def _loss(self, logits_tE, chosen_tE) -> torch.Tensor:
        """This rank's part of the microbatch's losses; those of all ranks that share it add up."""
        balance, tokens = self.balance, self.tokens
        z = aux = logits_tE.new_zeros(())
        if balance.z_coeff:
            square_t = logits_tE.float().logsumexp(dim=-1).square()
            z = (square_t * tokens.is_real_t).sum() / max(tokens.num_tokens, 1)
        if balance.loss != "none":
            aux = self._auxiliary(logits_tE.softmax(dim=-1, dtype=torch.float32), chosen_tE)
        share = torch.full_like(aux, 1 / self.tp_cp_group.size())
        self.losses += tokens.weight * torch.stack([aux.detach(), z.detach(), share])
        return balance.coeff * aux + balance.z_coeff * z

    def _auxiliary(self, scores_tE, chosen_tE) -> torch.Tensor:
        """The mean over groups of `E * sum f P`, P of this rank's tokens alone."""
        tokens = self.tokens
        if self.balance.loss == "seq_aux_loss":
            group_t, size_n, groups = tokens.sample_t, tokens.size_n, tokens.samples
        else:
            group_t = (~tokens.is_real_t).long()
            size_n, groups = scores_tE.new_full((1,), tokens.num_tokens), 1

        def of_groups(x_tE: torch.Tensor) -> torch.Tensor:
            sums = x_tE.new_zeros(len(size_n) + 1, self.num_experts)
            return sums.index_add(0, group_t, x_tE)[:-1]  # without padding

        load_nE = of_groups(chosen_tE.float())
        if self.balance.loss == "global_aux_loss":
            dist.all_reduce(load_nE, group=self.tp_dp_cp_group)
            self.batch_load_E += load_nE[0]
            load_nE = self.batch_load_E[None].clone()
        elif self.tp_cp_group.size() > 1:
            dist.all_reduce(load_nE, group=self.tp_cp_group)
        share_nE = load_nE / load_nE.sum(1, keepdim=True).clamp(min=1)
        mean_nE = of_groups(scores_tE) / size_n[:, None].clamp(min=1)
        return self.num_experts * (share_nE * mean_nE).sum() / max(groups, 1)


def routers(chunks: list[torch.nn.Module]) -> list[BalancedRouter]:
    """All of this rank's layers'."""
    return [one for chunk in chunks for one in chunk.modules() if isinstance(one, BalancedRouter)]


def forget_batch(chunks: list[torch.nn.Module]) -> None:
    """Of the step that ended: the next one balances its own tokens."""
    for router in routers(chunks):
        router.batch_load_E.zero_()
