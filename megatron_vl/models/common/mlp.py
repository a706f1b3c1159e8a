"""Megatron-Core's layer, whose MLP has an activation function of `megatron_vl.ops.fusion`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vl.ops.fusion import choose_kernel


class TowerMLP(MLP):
    """Two linear layers and what is between them; their weights and names are Megatron-Core's.

    Of an expert, every token's inner state is multiplied by the weight that the router gave it.
    Under `recompute_activation` the input of the second layer, which it keeps for its weight's
    gradient, is dropped in forward and made again in backward of what the first one gave.
    """

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, width] to the same, and the bias that is to be added to it, if there is one.

        An expert's tokens are [n, width], with `per_token_scale` float [n].
        """
        config = self.config
        activate = choose_kernel(config.activation, config.fused_ops).function
        if config.cpu_offloading and config.activation == "swiglu":
            # Marks what it keeps for backward, as TransformerEngine's offloading looks for it.
            activate = partial(bias_swiglu_impl, cpu_offload_input=True)
        given = self.linear_fc1(hidden_states)
        if per_token_scale is not None:
            activate, given = partial(_weighted, activate), (*given, per_token_scale)
        if not (config.recompute_activation and torch.is_grad_enabled()):
            return self.linear_fc2(activate(*given))
        again = CheckpointWithoutOutput()
        output, bias = self.linear_fc2(again.checkpoint(activate, *given))
        again.discard_output_and_register_recompute(output)
        return output, bias


def _weighted(
    activate: Callable, inner: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor:
    """The activation of [n, ..], times float [n], in the dtype of the former."""
    active = activate(inner, bias)
    return (active * scale.unsqueeze(-1)).to(active.dtype)


class TowerLayer(TransformerLayer):
    """Megatron-Core's layer with a TowerMLP, or with experts each of which is one.

    Its versions hand the process groups to an MLP in ways of their own, and to no class but theirs:
    it is built as that.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for mlp in self.mlp.experts.local_experts if self.is_moe_layer else [self.mlp]:
            assert type(mlp) is MLP
            mlp.__class__ = TowerMLP

    def forward(
        self, *args, context: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [s, b, width] to the same, and the features that are left.

        Args:
            context: features [K, s, b, width], of which this layer adds the first to its output;
                None: there are none. Megatron-Core hands it from layer to layer, and through
                those that are computed again, for cross-attention.
        """
        if self.is_moe_layer:
            self.mlp.router.tokens = kwargs["packed_seq_params"].routed
        output, _ = super().forward(*args, **kwargs)
        if context is None:
            return output, None
        added, left = context.split([1, len(context) - 1])  # one gradient of both; slices have two
        return output + added[0], left if len(left) else None
