"""Megatron-Core layer specs: TransformerEngine's where it can run, the local one elsewhere.

Both give the same checkpoint names: `sharded_state_dict_keys_map` gives local norms the fused
names, and `to_local_names` does the same for plain state dicts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_vl.models.common.core_attention import VarlenCoreAttention
from megatron_vl.models.common.mlp import TowerLayer
from megatron_vl.models.common.quantized_linear import QuantizedColumnLinear, QuantizedRowLinear
from megatron_vl.models.common.router import BalancedRouter
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


def backend(*, quantized: bool = False) -> BackendSpecProvider:
    """What layers are made of here: Megatron-Core's own provider, with our attention and norms.

    Args:
        quantized: their linear weights are, which TransformerEngine's products cannot read.
    """
    if quantized:
        return _LocalQuantized()
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return _Local()


class _Local(LocalSpecProvider):
    """Without TransformerEngine; its norms know nothing of sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **options) -> type:
        return TorchNorm


class _LocalQuantized(_Local):
    """The same with quantised weights, those of experts too."""

    def column_parallel_linear(self) -> type:
        return QuantizedColumnLinear

    def row_parallel_linear(self) -> type:
        return QuantizedRowLinear

    def grouped_mlp_modules(self, *grouped_gemm: bool) -> tuple[type, MLPSubmodules] | partial:
        made_of = MLPSubmodules(linear_fc1=QuantizedColumnLinear, linear_fc2=QuantizedRowLinear)
        if isinstance(super().grouped_mlp_modules(*grouped_gemm), tuple):  # Megatron-Core 0.16
            return SequentialMLP, made_of
        return partial(SequentialMLP, submodules=made_of)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """What may differ from layer to layer of a tower."""

    causal: bool  # the mask inside a segment: in language models, not in vision towers
    windowed: bool = False  # attends within `SegmentParams.windows`
    qk_norm: bool = False  # queries and keys are normalised, head by head
    experts: int | None = None  # that it has in the place of its MLP
    quantized: bool = False  # its linear weights are, in the form its configuration says


def layer_spec(kind: LayerKind) -> ModuleSpec:
    """One transformer layer with variable-length attention."""
    made_of = backend(quantized=kind.quantized)
    fused = made_of.fuse_layernorm_and_linear()
    qk_norm = made_of.layer_norm(for_qk=True) if kind.qk_norm else IdentityOp
    return ModuleSpec(
        module=TowerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={
                    "attn_mask_type": AttnMaskType.causal if kind.causal else AttnMaskType.no_mask
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=made_of.column_parallel_layer_norm_linear() if fused
                    else made_of.column_parallel_linear(),
                    core_attention=partial(VarlenCoreAttention, windowed=kind.windowed),
                    linear_proj=made_of.row_parallel_linear(),
                    q_layernorm=qk_norm, k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=_mlp(made_of, kind.experts),
            mlp_bda=get_bias_dropout_add,
            **_norms(made_of, kind),
        ),
    )


def _mlp(made_of: BackendSpecProvider, experts: int | None) -> ModuleSpec | partial:
    """Megatron-Core's, with our router where there are experts."""
    spec = get_mlp_module_spec_for_backend(made_of, num_experts=experts)
    if experts is not None:
        # A partial since 0.17; both hold what was made for this layer alone.
        parts = spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
        parts.router = BalancedRouter
    return spec


def _norms(made_of: BackendSpecProvider, kind: LayerKind) -> dict:
    """The norms that are modules by themselves, and the fused names that a checkpoint has for them.

    What comes before experts never is part of a linear layer: their router reads it too.
    """
    norm, names = made_of.layer_norm(), {local: fused for fused, local in FUSED_NORM_NAMES.items()}
    if kind.experts is not None:
        del names["pre_mlp_layernorm."]
    if made_of.fuse_layernorm_and_linear():
        return {} if kind.experts is None else {"pre_mlp_layernorm": norm}
    return {"input_layernorm": norm, "pre_mlp_layernorm": norm,
            "sharded_state_dict_keys_map": names}


def block_spec(kinds: Sequence[LayerKind]) -> TransformerBlockSubmodules:
    """Layers of these kinds, in order, and the final norm of a block."""
    return TransformerBlockSubmodules(
        layer_specs=list(map(layer_spec, kinds)), layer_norm=backend().layer_norm()
    )


def projector_submodules() -> MLPSubmodules:
    """Column- then row-parallel linear of the vision merger; it has no norm of its own."""
    made_of = backend()
    return MLPSubmodules(
        linear_fc1=made_of.column_parallel_linear(), linear_fc2=made_of.row_parallel_linear()
    )


def to_local_names(name: str, own: Container[str]) -> str:
    """A checkpoint's parameter name as the modules built here, whose names are `own`, call it."""
    if name in own:
        return name
    for fused, local in FUSED_NORM_NAMES.items():
        name = name.replace(fused, local)
    return name
