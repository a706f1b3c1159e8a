"""Qwen2-VL's config.json, in the flat form it was published in and in transformers 5's nested one.

Flat: the decoder's keys lie at the top, rope under `rope_theta` and `rope_scaling`. Nested: they
lie under `text_config`, rope under `rope_parameters`. Every number the model needs comes from here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_vl.models.common.decoder_config import Width, first
from megatron_vl.models.common.media_config import GROUNDING, PatchKeys, read_vision_language
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.typed import Name, Positive

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "2B": (28, 1536),
    "7B": (28, 3584),
    "72B": (80, 8192),
}


class _Vision(PatchKeys):
    """vision_config."""

    embed_dim: Width
    mlp_ratio: Annotated[Positive, Field(le=1024)] = 4.0
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
        **keys.shared(),
        hidden_size=keys.embed_dim,
        ffn_hidden_size=int(keys.embed_dim * keys.mlp_ratio),
        out_hidden_size=keys.hidden_size or decoder_hidden,
        activation=keys.hidden_act,
    )
