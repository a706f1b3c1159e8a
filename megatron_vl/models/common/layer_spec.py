"""Megatron-Core layer specs: TransformerEngine's where it can run, the local one elsewhere.

Both give the same checkpoint names: `sharded_state_dict_keys_map` gives local norms the fused
names, and `to_local_names` does the same for plain state dicts.
"""

from __future__ import annotations

import importlib.util

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_vl.models.common.core_attention import VarlenCoreAttention
from megatron_vl.models.common.mlp import TowerLayer
from megatron_vl.ops.norm import TorchNorm
from megatron_vl.platform import select_platform

FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def use_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: installed, and a CUDA device to run on."""
    return (
        select_platform().runs_cuda and importlib.util.find_spec("transformer_engine") is not None
    )


def layer_spec(*, causal: bool) -> ModuleSpec:
    """One transformer layer with variable-length attention.

    `causal` picks the mask inside a segment: True for the language model, False for vision.
    """
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import (
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        return _layer(mask, TELayerNormColumnParallelLinear, TERowParallelLinear)
    return _layer(mask, ColumnParallelLinear, RowParallelLinear, norm=TorchNorm)


def _layer(mask, column, row, norm=None) -> ModuleSpec:
    norms = {} if norm is None else {
        "input_layernorm": norm,
        "pre_mlp_layernorm": norm,
        "sharded_state_dict_keys_map": {
            local: fused for fused, local in FUSED_NORM_NAMES.items()
        },
    }
    return ModuleSpec(
        module=TowerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=VarlenCoreAttention, linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            **norms,
        ),
    )


def block_spec(*, causal: bool, num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` like layers and the final norm of a block."""
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = TorchNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(causal=causal)] * num_layers, layer_norm=final_norm
    )


def projector_submodules() -> MLPSubmodules:
    """Column- then row-parallel linear of the vision merger; it has no norm of its own."""
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def to_local_names(name: str) -> str:
    """A checkpoint's parameter name as the modules built here call it."""
    if use_transformer_engine():
        return name
    for fused, local in FUSED_NORM_NAMES.items():
        name = name.replace(fused, local)
    return name


def to_checkpoint_names(name: str) -> str:
    """The inverse of `to_local_names`: the ecosystem's name of a module's parameter."""
    for fused, local in FUSED_NORM_NAMES.items():
        name = name.replace(local, fused)
    return name
