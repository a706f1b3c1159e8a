"""A TransformerBlock that also gives what some of its layers put out.

Megatron-Core's gives the last layer's output alone, and what a layer leaves aside while it is
checkpointed has no gradient. Here a group of checkpointed layers ends where one is kept.

Letters: P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import make_viewless_tensor

from megatron_vl.models.common.core_attention import SegmentParams


class KeepingBlock(TransformerBlock):
    """Layers of a vision tower: no sequence parallelism, no 8 bits, no offloading.

    Args:
        keeps: layers of this block, from 0, whose output is given too.
    """

    def __init__(self, *args, keeps: Sequence[int], **options):
        super().__init__(*args, **options)
        self.keeps = tuple(keeps)

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: SegmentParams
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last layer's output [P, 1, D], normed where the tower ends; and the kept ones."""
        hidden_P1D = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        kept = []
        for group, recomputed in self._groups():
            run = partial(self._run, group, packed_seq_params)
            hidden_P1D = (tensor_parallel.checkpoint(run, False, hidden_P1D) if recomputed
                          else run(hidden_P1D))
            if group[-1] in self.keeps:
                kept.append(hidden_P1D)
                # What follows sums its gradients first, as where it is computed again.
                hidden_P1D = hidden_P1D.view_as(hidden_P1D)
        if self.final_layernorm is not None:
            hidden_P1D = self.final_layernorm(hidden_P1D)
        return hidden_P1D, kept

    def _groups(self) -> Iterator[tuple[range, bool]]:
        """Layers, in order, and whether they are computed again in backward; as
        `recompute_method` says, but that a group ends with a kept layer."""
        config, count = self.config, len(self.layers)
        full = self.training and config.recompute_granularity == "full"
        uniform = full and config.recompute_method == "uniform"
        size = config.recompute_num_layers if uniform else 1
        bounds = {*range(0, count, size), *(layer + 1 for layer in self.keeps), count}
        for first, end in pairwise(sorted(bounds)):
            yield range(first, end), uniform or (full and first < config.recompute_num_layers)

    def _run(
        self, group: range, params: SegmentParams, hidden_P1D: torch.Tensor
    ) -> torch.Tensor:
        for number in group:
            hidden_P1D, _ = self.layers[number](
                hidden_states=hidden_P1D, attention_mask=None, packed_seq_params=params
            )
        return hidden_P1D
