"""Megatron-Core's layer, whose MLP has an activation function of `megatron_vl.ops.fusion`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vl.ops.fusion import choose_kernel
from megatron_vl.ops.grouped_linear import grouped_linear


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
        return _two_layers(
            self.config, self.linear_fc1, self.linear_fc2, hidden_states, per_token_scale
        )


class GroupedExperts(SequentialMLP):
    """The experts of a layer on a rank, a linear layer of all of them in one product.

    Their weights and names are Megatron-Core's. Communication is the dispatcher's: by themselves
    linear layers of experts have none.
    """

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """[n, width] to the same.

        Args:
            permuted_local_hidden_states: tokens in the order of their experts.
            tokens_per_expert: int [experts], on the host or the device.
            permuted_probs: float [n], what the router weighs them by.
        """
        hidden = permuted_local_hidden_states
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(hidden.device, non_blocking=True)

        def layer_of_all(name: str) -> Callable:
            weights = [getattr(one, name)() for one in self.local_experts]
            return lambda x: (grouped_linear(x, weights, ends), None)

        return _two_layers(
            self.config, layer_of_all("linear_fc1"), layer_of_all("linear_fc2"), hidden,
            permuted_probs,
        )


@cache
def _giving_its_weight(linear: type) -> type:
    """The linear layer that gives its weight when it is called, and so after the hooks that wait
    for the weight."""
    return type(linear.__name__, (linear,), {"forward": lambda self: self.weight})


def _two_layers(
    config, first: Callable, second: Callable, x: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two linear layers, each of which gives its output and a bias, and what is between them."""
    activate = choose_kernel(config.activation, config.fused_ops).function
    if config.cpu_offloading and config.activation == "swiglu":
        # Marks what it keeps for backward, as TransformerEngine's offloading looks for it.
        activate = partial(bias_swiglu_impl, cpu_offload_input=True)
    given = first(x)
    if scale is not None:
        activate, given = partial(_weighted, activate), (*given, scale)
    if not (config.recompute_activation and torch.is_grad_enabled()):
        return second(activate(*given))
    again = CheckpointWithoutOutput()
    output, bias = second(again.checkpoint(activate, *given))
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
        if self.is_moe_layer and self.config.grouped_experts:
            self._group(self.mlp.experts)

    @staticmethod
    def _group(experts: SequentialMLP) -> None:
        assert type(experts) is SequentialMLP
        experts.__class__ = GroupedExperts
        for mlp in experts.local_experts:
            for linear in (mlp.linear_fc1, mlp.linear_fc2):
                linear.__class__ = _giving_its_weight(type(linear))

    def _forget_routing(self) -> None:
        """Megatron-Core's dispatcher keeps the router's weights until the next forward and, by
        their graph, the input of a layer that is computed again and its gradient."""
        dispatcher = self.mlp.token_dispatcher
        dispatcher.probs = dispatcher.routing_map = None
        dispatcher.reversed_local_input_permutation_mapping = None

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
        if self.is_moe_layer:
            self._forget_routing()
        if context is None:
            return output, None
        added, left = context.split([1, len(context) - 1])  # one gradient of both; slices have two
        return output + added[0], left if len(left) else None
