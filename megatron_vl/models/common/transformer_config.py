"""Megatron-Core configurations of the towers, each built fresh from the model's own sizes.

An encoder's configuration never sees the language model's pipeline split: a shared or copied one
would silently cut vision layers off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.transformer import TransformerConfig

from megatron_vl.errors import InputError
from megatron_vl.models.common.balance import NO_BALANCE, Balance
from megatron_vl.models.common.experts_way import experts_way
from megatron_vl.models.common.layer_spec import use_transformer_engine
from megatron_vl.models.common.recompute import NOTHING, Recompute
from megatron_vl.models.spec import ModelSpec
from megatron_vl.ops.attention import choose_backend
from megatron_vl.ops.experts import AUTO
from megatron_vl.ops.fusion import ACTIVATIONS
from megatron_vl.parallel import LANGUAGE, Layout, StageSplit
from megatron_vl.platform import select_platform


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How a model is run, as opposed to what it is."""

    params_dtype: torch.dtype = torch.float32
    attention_backend: str = "auto"  # of megatron_vl.ops.attention.BACKENDS or ORDERS
    recompute: Recompute = NOTHING  # of the language model
    vit_recompute: Recompute = NOTHING  # of the vision tower
    fp8_format: str | None = None  # of TransformerEngine: "e4m3" or "hybrid"
    cpu_offloading: bool = False  # keep the decoder's activations in host memory
    cpu_offloading_num_layers: int = 1
    offload_modules: tuple[str, ...] = ()  # of the decoder's layers: see OffloadOptions
    min_offloaded_tensor_size: int = 2**20  # numbers
    cross_entropy_chunks: int = 1  # parts of a microbatch's positions that have logits in turn
    fused_ops: bool = False  # elementwise operations by kernels made at run time
    deterministic: bool = False  # only kernels that give the same bits at every run
    initialize_weights: bool = True  # False when a checkpoint fills them right after
    row_lengths_vary: bool = False  # from one microbatch to the next; not with virtual stages
    frozen: tuple[str, ...] = ()  # keys of megatron_vl.models.common.parts.PARTS
    adapted: tuple[str, ...] = ()  # those of PARTS in which adapters are trained
    balance: Balance = NO_BALANCE  # of the experts, where there are any
    train_constants: bool = False  # also what the family's weight map calls constant
    # Of megatron_vl.ops.blockwise.FORMS: that of the language layers' linear weights, then frozen.
    quantize_base: str | None = None
    moe_grouped_gemm: str = AUTO  # of megatron_vl.ops.experts.CHOICES
    # Megatron-Core's fields of what the language layers' messages overlap with.
    tp_overlap: Mapping[str, bool] = field(default_factory=dict)


@dataclass
class TowerConfig(TransformerConfig):
    """Megatron-Core's configuration plus the choices of `megatron_vl.ops`."""

    varlen_attention_backend: str = "auto"
    fused_ops: bool = False
    activation: str = "gelu"  # of megatron_vl.ops.fusion.OPERATIONS
    recompute_activation: bool = False  # of the MLPs
    cross_entropy_chunks: int = 1
    quantize_base: str | None = None  # as ModelOptions's
    balance: Balance = NO_BALANCE  # as ModelOptions's
    grouped_experts: bool = False  # those of a layer in one product
    # The word embedding is then not on the first stage, where Megatron-Core expects it.
    embedding_moved: bool = False


def language_config(
    spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions
) -> TowerConfig:
    """The decoder's configuration; the pipeline split is given explicitly for every chunk."""
    decoder = spec.decoder
    return TowerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        kv_channels=decoder.head_dim,
        add_bias_linear=False,
        add_qkv_bias=decoder.qkv_bias,
        # Sums these norms' gradients over tensor-parallel ranks, each of which has some heads.
        qk_layernorm=decoder.qk_norm,
        **_experts(spec, layout, options),
        gated_linear_unit=True,
        activation="swiglu",
        normalization="RMSNorm",
        layernorm_epsilon=decoder.norm_eps,
        fp8=options.fp8_format,
        cpu_offloading=options.cpu_offloading,
        cpu_offloading_num_layers=options.cpu_offloading_num_layers,
        fine_grained_activation_offloading=bool(options.offload_modules),
        offload_modules=list(options.offload_modules),
        min_offloaded_tensor_size=options.min_offloaded_tensor_size,
        cross_entropy_chunks=options.cross_entropy_chunks,
        **_initialization(options, decoder.init_std),
        embedding_moved=split.encoders_span,
        quantize_base=options.quantize_base,
        variable_seq_lengths=options.row_lengths_vary,
        # Megatron-Core asks for it together with the one above, also where there are no experts.
        moe_token_dispatcher_type="alltoall",
        context_parallel_size=layout.cp,
        **options.tp_overlap,
        **_pipeline(layout, split, LANGUAGE),
        **_recompute(options.recompute, options, decoder.head_dim, options.offload_modules),
        **_shared(layout, options, sequence_parallel=layout.sequence_parallel),
    )


def _experts(spec: ModelSpec, layout: Layout, options: ModelOptions) -> dict:
    experts, balance = spec.decoder.experts, options.balance
    if experts is None:
        return {}
    way = experts_way(
        spec, layout, options.moe_grouped_gemm,
        dtype=str(options.params_dtype).removeprefix("torch."),
        kept=options.quantize_base or options.fp8_format,
    )
    return dict(
        num_moe_experts=experts.count,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        moe_ffn_hidden_size=experts.ffn_hidden_size,
        moe_router_topk=experts.per_token,
        # Softmax over the chosen alone is that over all of them, made to sum to one.
        moe_router_pre_softmax=not experts.renormalized,
        moe_router_load_balancing_type="none",  # the losses are BalancedRouter's
        moe_expert_capacity_factor=balance.capacity_factor,  # as the dispatcher must know
        moe_router_dtype="fp32",
        balance=balance,
        grouped_experts=way.grouped,
    )


def encoder_config(
    tower: str, spec: ModelSpec, layout: Layout, split: StageSplit, options: ModelOptions, *,
    ffn_hidden_size: int, normalization: str,
) -> TowerConfig:
    """The configuration of a vision tower's layers, with a pipeline of its own where it spans
    stages.

    Args:
        tower: its name in `split`.
        ffn_hidden_size: width of its MLP in the model that trains.
        normalization: "LayerNorm" or "RMSNorm".

    Raises:
        InputError: an activation that is not known; that of an MLP with a gate is SiLU.
    """
    vision = spec.vision
    if vision.activation not in (("silu",) if vision.gated else ACTIVATIONS):
        raise InputError(
            f"config.json names the vision activation {vision.activation!r}; known are "
            f"{'silu' if vision.gated else ', '.join(ACTIVATIONS)}."
        )
    return TowerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        add_bias_linear=True,
        add_qkv_bias=True,
        activation="swiglu" if vision.gated else vision.activation,
        gated_linear_unit=vision.gated,
        normalization=normalization,
        layernorm_epsilon=vision.norm_eps,
        **_initialization(options, spec.decoder.init_std),
        **(_pipeline(layout, split, tower) if split.spans(tower) else {}),
        **_recompute(options.vit_recompute, options, vision.head_dim),
        # Patch counts need not divide by tp, so vision activations stay whole on every tp rank.
        **_shared(_vision_layout(layout), options, sequence_parallel=False),
    )


def encoder_projector_config(
    spec: ModelSpec, layout: Layout, options: ModelOptions, **sizes
) -> TowerConfig:
    """Of the MLP between an encoder and the language model; `sizes`: Megatron-Core's own fields."""
    return TowerConfig(
        num_layers=1,
        **sizes,
        **_initialization(options, spec.decoder.init_std),
        **_shared(_vision_layout(layout), options, sequence_parallel=False),
    )


def _vision_layout(layout: Layout) -> Layout:
    return replace(layout, tp=layout.vit_tp, ep=1, etp=None)


def _pipeline(layout: Layout, split: StageSplit, tower: str) -> dict:
    """How many of the tower's layers each chunk holds; the names at the ends are Megatron-Core's
    and say nothing about where our embedding and head are."""
    if layout.pp == 1:
        return dict(pipeline_model_parallel_size=1)
    chunks = [["decoder"] * count for count in split.flat(tower)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return dict(pipeline_model_parallel_size=layout.pp, pipeline_model_parallel_layout=chunks)


def _shared(layout: Layout, options: ModelOptions, *, sequence_parallel: bool) -> dict:
    shared = dict(
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=sequence_parallel,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        fp16=options.params_dtype == torch.float16,
        varlen_attention_backend=options.attention_backend,
        fused_ops=options.fused_ops,
        deterministic_mode=options.deterministic,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # The mean over trained tokens is taken once, over every microbatch and data rank.
        calculate_per_token_loss=True,
        # Under virtual stages a rank sends both ways to the same neighbour when there are two
        # stages; batched, those messages are matched by order and silently swapped.
        overlap_p2p_comm=layout.vp > 1,
        batch_p2p_comm=layout.vp == 1,
        # The host would wait for the device at every message, for torch before 2.
        batch_p2p_sync=False,
        gradient_accumulation_fusion=options.fused_ops and select_platform().runs_cuda,
    )
    return shared


def leave_as_allocated(weight: torch.Tensor) -> None:
    """The initialization of weights that a checkpoint fills right after."""


def _initialization(options: ModelOptions, std: float) -> dict:
    if options.initialize_weights:
        return dict(init_method_std=std)
    # Never `perform_initialization=False`: Megatron-Core marks a weight as a tensor-parallel shard
    # while initializing it, and what is not marked is left out of the gradient norm as a duplicate
    # on every rank but the first.
    return dict(
        init_method_std=std,
        init_method=leave_as_allocated,
        output_layer_init_method=leave_as_allocated,
    )


def _recompute(
    recompute: Recompute, options: ModelOptions, head_dim: int, offloaded: Sequence[str] = ()
) -> dict:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return dict(
            recompute_granularity="selective",
            recompute_modules=[
                one for one in _recomputed_modules(options, head_dim) if one not in offloaded
            ],
            # TransformerEngine's layers keep their inputs in 8 bits then.
            recompute_activation=options.fp8_format is None,
        )
    return dict(
        recompute_granularity="full",
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
    )


def _recomputed_modules(options: ModelOptions, head_dim: int) -> list[str]:
    """What costs little to make again for what it takes to keep."""
    modules = []
    if not use_transformer_engine():  # whose norms are part of its linear layers
        modules.append("layernorm")
    attention = choose_backend(
        options.attention_backend, dtype=options.params_dtype, head_dim=head_dim,
        deterministic=options.deterministic,
    )
    if attention.name == "sdpa":  # a flash kernel keeps no scores, and computes them again anyway
        modules.append("core_attn")
    return modules
