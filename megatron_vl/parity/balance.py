"""The auxiliary losses of routers by their formulas, of the router logits that transformers gives.

transformers' own `load_balancing_loss_func` is another: it joins the layers, as if they had the
same experts, and a token counts as often as it has experts.

Letters: L tokens of a sample, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vl.models.common.balance import Balance

Logits = Sequence[torch.Tensor]  # of one sample, [L, E] of each layer


def loads(samples: Sequence[Logits], k: int) -> torch.Tensor:
    """float [layers, E]: tokens of `samples` that chose each expert."""
    return torch.stack([
        sum(_load(logits_LE, k) for logits_LE in layer) for layer in zip(*samples, strict=True)
    ])


def balance_loss(
    balance: Balance, samples: Sequence[Logits], k: int, batch: torch.Tensor | None = None
) -> torch.Tensor:
    """Of a microbatch's samples, summed over layers.

    Args:
        batch: float [layers, E], for global_aux_loss: of all tokens so far.
    """
    total = torch.zeros(())
    for number, layer in enumerate(zip(*samples, strict=True)):
        every = torch.cat(layer)
        total = total + balance.z_coeff * every.logsumexp(-1).square().mean()
        if balance.loss == "none":
            continue
        groups = layer if balance.loss == "seq_aux_loss" else [every]
        for group in groups:
            load_E = _load(group, k) if batch is None else batch[number]
            f_E, p_E = load_E / load_E.sum(), group.softmax(-1).mean(0)
            total = total + balance.coeff * len(f_E) * (f_E @ p_E) / len(groups)
    return total


def _load(logits_LE: torch.Tensor, k: int) -> torch.Tensor:
    chosen = logits_LE.detach().topk(k, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=logits_LE.shape[1]).float()
