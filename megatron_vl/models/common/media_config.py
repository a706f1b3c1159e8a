"""What config.json says of media, in Qwen2-VL and in those after it. No Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from megatron_vl.models.common.decoder_config import (
    Layers,
    TokenId,
    Width,
    first,
    read_decoder,
    read_dtype,
    read_text_tokens,
    read_tied,
)
from megatron_vl.models.common.experts_config import read_experts
from megatron_vl.models.spec import Grounding, JsonGrounding, ModelSpec, TokenIds
from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.typed import Shape

# arXiv 2409.12191, section 2.2.1: coordinates within [0, 1000).
GROUNDING = Grounding(
    ref=("<|object_ref_start|>", "<|object_ref_end|>"), box=("<|box_start|>", "<|box_end|>"),
    quad=("<|quad_start|>", "<|quad_end|>"), scale=1000,
)


class _Towers(Shape):
    """The tables within."""

    vision_config: dict
    text_config: dict = Field(default_factory=dict)


class PatchKeys(Shape):
    """Of vision_config, what is said of patches; names and meanings are `VisionSpec`'s."""

    depth: Layers
    num_heads: Width
    in_channels: Annotated[int, Field(ge=1, le=1024)] = 3
    patch_size: Annotated[int, Field(ge=1, le=1024)]
    temporal_patch_size: Annotated[int, Field(ge=1, le=1024)] = 2
    spatial_merge_size: Annotated[int, Field(ge=1, le=1024)] = 2

    def shared(self) -> dict:
        """These keys, for a `VisionSpec`."""
        return {name: getattr(self, name) for name in PatchKeys.model_fields} | {
            "norm_eps": 1e-6  # fixed in the published models; config.json has no key for it
        }


class _Tokens(Shape):
    """The ids of what stands for media."""

    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId


def read_vision_language(
    config: dict, read_vision: Callable[[dict, int], VisionSpec],
    grounding: Grounding | JsonGrounding, *, qk_norm: bool = False, interleaved: bool = False,
    timestamp: str | None = None, with_experts: bool = False, outer_tie: bool = False,
) -> ModelSpec:
    """The spec of a parsed config.json with a decoder of three axes and a tower.

    Args:
        read_vision: the tower's spec, of `vision_config` and the decoder's width.
        qk_norm, interleaved: see `read_decoder`.
        timestamp: see `TokenIds`.
        with_experts: whether every layer has experts in the place of its MLP; the weights of a
            token's sum to one.
        outer_tie: whether what is said of the whole model ties its output layer to the embedding,
            whatever text_config says, in which transformers 5 writes a default that is not used.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    towers = first(_Towers, config)
    text = towers.text_config
    decoder = read_decoder(
        text, config, multi_axis=True, qk_norm=qk_norm, interleaved=interleaved,
        experts=read_experts(text, config, renormalized=True) if with_experts else None,
        tied=read_tied(config, text) if outer_tie else None,
    )
    tokens = first(_Tokens, config, text)
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config, text),
        decoder=decoder,
        vision=read_vision(towers.vision_config, decoder.hidden_size),
        tokens=TokenIds(
            image=tokens.image_token_id,
            video=tokens.video_token_id,
            vision_start=tokens.vision_start_token_id,
            vision_end=tokens.vision_end_token_id,
            timestamp=timestamp,
            grounding=grounding,
            **read_text_tokens(config, text),
        ),
    )
