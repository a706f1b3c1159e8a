"""GPTModel with a loss head that works only where a token is trained.

Letters: s row length, b rows, n trained positions, E language width, V vocabulary (per tp rank).
A normalised head (NormHead) is the direction of each of its rows: row-wise, so that tensor
parallelism over the vocabulary changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    PipelineOffloadManager,
)
from torch.nn import functional as F

from megatron_vl.models.common.loss_head import LossHead
from megatron_vl.ops.fusion import choose_kernel


class Scores(NamedTuple):
    """What a model in evaluation says of the trained positions of a microbatch."""

    loss_n: torch.Tensor  # float32 [n]
    likeliest_n: torch.Tensor  # int64 [n]: the word of the largest logit; of equals the lowest id


class LanguageModel(GPTModel):
    """GPTModel whose training head works only where a token is trained.

    A visual instruction row trains its answers, often a twentieth of its tokens; logits over
    150,000 words for the others would be computed, stored and thrown away.
    """

    real_vocab_size: int  # without the rows that pad it for tensor parallelism
    normalized_head: bool

    def setup_embeddings_and_output_layer(self) -> None:
        """Marks the weights; where the embedding is not on the first stage, its copies are tied by
        `sum_tied`, for Megatron-Core looks for them on the first and the last stage."""
        if not self.config.embedding_moved:
            super().setup_embeddings_and_output_layer()
            return
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        weight = self.shared_embedding_or_output_weight()
        if not self.share_embeddings_and_output_weights or weight is None:
            return
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True  # two layers add their gradients to it
            return
        weight.shared_embedding = True  # alike over data ranks on both stages
        if self.post_process:
            weight.shared = True  # a copy, which the gradient norm leaves out
            weight.data.zero_()

    def preprocess_for_fine_grained_offloading(self) -> None:
        """Megatron-Core's, which begins a microbatch; it knows those of training alone."""
        manager = PipelineOffloadManager.get_instance()
        if not self.training:
            manager.disable_offload()
            return
        manager.enable_offload()
        super().preprocess_for_fine_grained_offloading()

    def _head_weight(self) -> torch.Tensor:
        """What hidden states are multiplied with, [V, E]."""
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        # A row of zeros, which pads the vocabulary, stays one.
        return F.normalize(weight, dim=1) if self.normalized_head else weight

    def _postprocess(self, hidden_states, *args, labels=None, loss_mask=None, **kwargs):
        if not self.post_process:
            return super()._postprocess(
                hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs
            )
        for wait_for_weight in self.output_layer._forward_pre_hooks.values():
            wait_for_weight(self.output_layer, ())  # which does not run itself, or not yet
        weight = self._head_weight()
        if labels is None:
            logits_sbV, _ = self.output_layer(hidden_states, weight=weight)
            return logits_sbV.transpose(0, 1).contiguous()
        # What ColumnParallelLinear does around its product: the gradient of the replicated input
        # is summed over tensor-parallel ranks (and scattered again under sequence parallelism).
        if self.config.sequence_parallel:
            hidden_sbE = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True
            )
        else:
            hidden_sbE = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        weights_sb = loss_mask.transpose(0, 1)
        trained_sb = weights_sb > 0

        def on_device(x: torch.Tensor) -> torch.Tensor:
            return x.to(hidden_sbE.device, non_blocking=True)

        places_n = on_device(trained_sb.flatten().nonzero().flatten())
        hidden_nE = hidden_sbE.flatten(0, 1).index_select(0, places_n)
        label_n = on_device(labels.transpose(0, 1)[trained_sb])
        weight_n = on_device(weights_sb[trained_sb])
        head = LossHead(
            padding=self.vocab_size - self.real_vocab_size,
            at_once=-(-trained_sb.numel() // self.config.cross_entropy_chunks),
            cross_entropy=choose_kernel("cross_entropy", self.config.fused_ops).function,
        )
        if self.training:
            return head.losses(hidden_nE, weight, label_n) * weight_n
        loss_n, likeliest_n = head.scores(hidden_nE, weight, label_n)
        return Scores(loss_n * weight_n, likeliest_n)
