"""Qwen2-VL's config.json, in the flat form it was published in and in transformers 5's nested one.

Flat: the decoder's keys lie at the top, rope under `rope_theta` and `rope_scaling`. Nested: they
lie under `text_config`, rope under `rope_parameters`. Every number the model needs comes from here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_vl.models.common.decoder_config import Layers, Width, first
from megatron_vl.models.common.media_config import GROUNDING, read_vision_language
from megatron_vl.models.spec import ModelSpec, VisionSpec
from megatron_vl.typed import Name, Positive, Shape

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "2B": (28, 1536),
    "7B": (28, 3584),
    "72B": (80, 8192),
}


class _Vision(Shape):
    """vision_config."""

    embed_dim: Width
    depth: Layers
    num_heads: Width
    mlp_ratio: Annotated[Positive, Field(le=1024)] = 4.0
    in_channels: Annotated[int, Field(ge=1, le=1024)] = 3
    patch_size: Annotated[int, Field(ge=1, le=1024)]
    temporal_patch_size: Annotated[int, Field(ge=1, le=1024)] = 2
    spatial_merge_size: Annotated[int, Field(ge=1, le=1024)] = 2
    hidden_size: Width | None = None
    hidden_act: Name = "quick_gelu"


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json of Qwen2-VL.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return read_vision_language(config, _vision, GROUNDING)


def _vision(config: dict, decoder_hidden: int) -> VisionSpec:
    channels = {"in_channels": config.get("in_chans")}
    keys = first(_Vision, config, channels, at="vision_config")
    return VisionSpec(
        depth=keys.depth,
        hidden_size=keys.embed_dim,
        num_heads=keys.num_heads,
        ffn_hidden_size=int(keys.embed_dim * keys.mlp_ratio),
        in_channels=keys.in_channels,
        patch_size=keys.patch_size,
        temporal_patch_size=keys.temporal_patch_size,
        spatial_merge_size=keys.spatial_merge_size,
        norm_eps=1e-6,  # fixed in the published model; config.json has no key for it
        out_hidden_size=keys.hidden_size or decoder_hidden,
        activation=keys.hidden_act,
    )
