"""Megatron-Core's layer, whose MLP has an activation function of `megatron_vl.ops.fusion`."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vl.ops.fusion import choose_kernel


class TowerMLP(MLP):
    """Two linear layers and what is between them; their weights and names are Megatron-Core's.

    Under `recompute_activation` the input of the second layer, which it keeps for its weight's
    gradient, is dropped in forward and made again in backward of what the first one gave.
    """

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, width] to the same, and the bias that is to be added to it, if there is one."""
        assert per_token_scale is None  # of experts
        activate = choose_kernel(self.config.activation, self.config.fused_ops).function
        inner, bias = self.linear_fc1(hidden_states)
        if self.config.cpu_offloading:
            inner.activation_offloading = True  # what TransformerEngine's offloading looks for
        if not (self.config.recompute_activation and torch.is_grad_enabled()):
            return self.linear_fc2(activate(inner, bias))
        again = CheckpointWithoutOutput()
        output, bias = self.linear_fc2(again.checkpoint(activate, inner, bias))
        again.discard_output_and_register_recompute(output)
        return output, bias


class TowerLayer(TransformerLayer):
    """Megatron-Core's layer with a TowerMLP.

    Its versions hand the process groups to an MLP in ways of their own, and to no class but theirs:
    it is built as that.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert type(self.mlp) is MLP
        self.mlp.__class__ = TowerMLP
