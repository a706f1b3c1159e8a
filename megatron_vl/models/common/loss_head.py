"""Losses and likeliest words of trained positions, with the logits of some of them at a time.

Letters: n trained positions, c those of a part, E language width, V vocabulary (per tp rank),
R tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from megatron_vl.ops.cross_entropy import cross_entropy, without_padding


@dataclass(frozen=True, kw_only=True, slots=True)
class LossHead:
    """A head over the vocabulary, cut over tensor-parallel ranks, and the cross-entropy behind it.

    Attributes:
        padding: rows at the vocabulary's end that are no words, so that TP divides it.
        at_once: positions whose logits exist at a time.
        cross_entropy: of `megatron_vl.ops.fusion`.
    """

    padding: int
    at_once: int
    cross_entropy: Callable

    def losses(
        self, hidden_nE: torch.Tensor, weight_VE: torch.Tensor, label_n: torch.Tensor
    ) -> torch.Tensor:
        """float32 [n]. Logits of several parts are made again in backward."""
        if hidden_nE.shape[0] <= self.at_once:
            return self.cross_entropy(F.linear(hidden_nE, weight_VE), label_n, self.padding)
        return _InParts.apply(self, hidden_nE, weight_VE, label_n)

    def scores(
        self, hidden_nE: torch.Tensor, weight_VE: torch.Tensor, label_n: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same losses, without a graph, and the likeliest words, int64 [n]."""
        parts = []
        with torch.no_grad():
            for hidden_cE, label_c in self.parts(hidden_nE, label_n):
                logits_cV = without_padding(F.linear(hidden_cE, weight_VE), self.padding)
                # Before the cross-entropy, which overwrites the logits.
                likeliest_c = _likeliest(logits_cV)
                parts.append((cross_entropy(logits_cV, label_c, 0), likeliest_c))
                del logits_cV  # before the next part's
        loss_n, likeliest_n = map(torch.cat, zip(*parts, strict=True))
        return loss_n, likeliest_n

    def parts(self, *tensors: torch.Tensor):
        """Of tensors of as many rows, as many rows each as there may be logits at a time."""
        return zip(*(one.split(self.at_once) for one in tensors), strict=True)

    def gradients(
        self, hidden_cE: torch.Tensor, weight_VE: torch.Tensor, label_c: torch.Tensor,
        of_loss_c: torch.Tensor, of_hidden_cE: torch.Tensor, of_weight_VE: torch.Tensor | None,
    ) -> None:
        """Makes a part's logits again. Writes the gradient of its hidden states, and adds to that
        of the weight, if it has one."""
        with torch.enable_grad():
            logits_cV = F.linear(hidden_cE.detach().requires_grad_(), weight_VE.detach())
            gradient = get_gradient_edge(logits_cV)
            loss_c = self.cross_entropy(logits_cV, label_c, self.padding)
        del logits_cV  # of which the plain form has a copy in float32 by now
        (of_logits_cV,) = torch.autograd.grad(loss_c, gradient, of_loss_c)
        torch.mm(of_logits_cV, weight_VE, out=of_hidden_cE)
        if of_weight_VE is not None:
            of_weight_VE.addmm_(of_logits_cV.t(), hidden_cE)


class _InParts(torch.autograd.Function):
    """`LossHead.losses`, part by part.

    Gradients are not made at once in forward, where a second product with the weight would be
    saved: what they are multiplied with, fp16's loss scale among it, is known in backward alone.
    """

    @staticmethod
    def forward(ctx, head: LossHead, hidden_nE, weight_VE, label_n):
        ctx.head = head
        ctx.save_for_backward(hidden_nE, weight_VE, label_n)
        return torch.cat([
            head.cross_entropy(F.linear(hidden_cE, weight_VE), label_c, head.padding)
            for hidden_cE, label_c in head.parts(hidden_nE, label_n)
        ])

    @staticmethod
    def backward(ctx, of_loss_n):
        hidden_nE, weight_VE, label_n = ctx.saved_tensors
        of_hidden_nE = torch.empty_like(hidden_nE)
        of_weight_VE = torch.zeros_like(weight_VE) if ctx.needs_input_grad[2] else None
        for hidden_cE, label_c, of_loss_c, of_hidden_cE in ctx.head.parts(
            hidden_nE, label_n, of_loss_n, of_hidden_nE
        ):
            ctx.head.gradients(
                hidden_cE, weight_VE, label_c, of_loss_c, of_hidden_cE, of_weight_VE
            )
        return None, of_hidden_nE, of_weight_VE, None


def _likeliest(logits_nV: torch.Tensor) -> torch.Tensor:
    """The word of the largest logit over all tensor-parallel ranks, int64 [n]; of equals the lowest
    id. Ranks tell each other the maximum of their part of the vocabulary and where it is."""
    largest_n, word_n = logits_nV.max(dim=1)  # of equals the first
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return word_n
    word_n = word_n + parallel_state.get_tensor_model_parallel_rank() * logits_nV.shape[1]
    mine_2n = torch.stack([largest_n.double(), word_n.double()])  # which holds any word's id
    found = mine_2n.new_empty(2 * size, mine_2n.shape[1])  # gloo takes no third dimension
    torch.distributed.all_gather_into_tensor(
        found, mine_2n, group=parallel_state.get_tensor_model_parallel_group()
    )
    largest_Rn, word_Rn = found[::2], found[1::2]
    rank_n = largest_Rn.max(dim=0).indices  # ranks ascend as words do
    return word_Rn.gather(0, rank_n[None])[0].long()
