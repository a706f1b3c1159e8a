"""How many tokens every expert of every layer got in a step, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vl.models.common.balance import Balance
from megatron_vl.models.common.router import routers
from megatron_vl.training.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """Of one step or of several; alike on every rank. Padding is not counted."""

    balance: Balance
    tokens: list[list[int]]  # of every layer those of every expert, also of one that was full
    dropped: int  # of them, by experts that were full
    losses: tuple[float, float]  # (auxiliary, z): means over microbatches and layers

    def figures(self) -> dict[str, float]:
        """What is worth a curve, under the names that the files have; empty if nothing is counted.

        The load of an expert is its tokens over the mean of its layer.
        """
        loads = [count * len(layer) / sum(layer) for layer in self.tokens for count in layer
                 if sum(layer)]
        if not loads:
            return {}
        found = {"expert_load_max": max(loads), "expert_load_min": min(loads),
                 "idle_experts": loads.count(0.0)}
        if self.balance.loss != "none":
            found["load_balancing_loss"] = self.losses[0]
        if self.balance.z_coeff:
            found["router_z_loss"] = self.losses[1]
        if self.balance.capacity_factor is not None:
            found |= {"routed_tokens": sum(map(sum, self.tokens)), "dropped_tokens": self.dropped}
        return found


class ExpertLoads:
    """Takes the loads of each step from the routers of this rank's chunks."""

    def __init__(self, plan: Plan, model: list[torch.nn.Module], device: torch.device):
        self.decoder, self.balance = plan.spec.decoder, plan.balance
        self.routers, self.device = routers(model), device

    def take(self) -> ExpertLoad | None:
        """Of what was trained since the last call, over all ranks, which call it together; it waits
        for the device once. None of a model without experts."""
        if self.decoder.experts is None:
            return None
        layers, experts = self.decoder.num_layers, self.decoder.experts.count
        sums = torch.zeros(layers, experts + 4, dtype=torch.float64, device=self.device)
        for router in self.routers:
            sums[router.layer_number - 1] = router.take_counts()
        # Every rank counts tokens of its own, whichever ranks hold the experts they go to.
        torch.distributed.all_reduce(sums)
        rows = sums.tolist()
        dropped, aux, z, weight = (sum(row[experts + i] for row in rows) for i in range(4))
        return ExpertLoad(
            balance=self.balance,
            tokens=[list(map(int, row[:experts])) for row in rows], dropped=int(dropped),
            losses=(aux / weight, z / weight) if weight else (0.0, 0.0),
        )
