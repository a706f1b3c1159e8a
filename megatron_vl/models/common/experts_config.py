"""What config.json says of a decoder's experts. No Megatron-Core."""

from __future__ import annotations

from pydantic import AliasChoices, Field

from megatron_vl.errors import InputError, shown
from megatron_vl.models.common.decoder_config import Width, first
from megatron_vl.models.decoder_spec import ExpertsSpec
from megatron_vl.typed import Count, Number, Shape, Size


class _Experts(Shape):
    # transformers 5 writes the number under a name of its own.
    num_experts: Width = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: Width
    moe_intermediate_size: Width
    norm_topk_prob: bool | None = None
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[Count] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: Number = 0.001  # as transformers has it


def read_experts(*sections: dict, renormalized: bool | None = None) -> ExpertsSpec:
    """The experts of config.json's tables; of a key the first that has it wins.

    Args:
        renormalized: of a family whose models always or never make the weights of a token's
            experts sum to one; None: as config.json says.

    Raises:
        InputError: a key that is missing or unusable, or layers without experts.
    """
    keys = first(_Experts, *sections)
    if keys.decoder_sparse_step != 1 or keys.mlp_only_layers:
        name = "mlp_only_layers" if keys.mlp_only_layers else "decoder_sparse_step"
        raise InputError(
            f"{name} is {shown(str(getattr(keys, name)))}, which gives some layers an MLP and no "
            f"experts; only models whose every layer has experts are supported."
        )
    says = keys.norm_topk_prob
    if renormalized is not None and says not in (None, renormalized):
        raise InputError(
            f"norm_topk_prob is {str(says).lower()}; no model of this type was published so, and "
            f"transformers reads it as {str(renormalized).lower()}."
        )
    return ExpertsSpec(
        count=keys.num_experts,
        per_token=keys.num_experts_per_tok,
        ffn_hidden_size=keys.moe_intermediate_size,
        renormalized=bool(says if renormalized is None else renormalized),
        adds_aux_loss=keys.output_router_logits and keys.router_aux_loss_coef > 0,
        aux_loss_coeff=keys.router_aux_loss_coef,
    )
