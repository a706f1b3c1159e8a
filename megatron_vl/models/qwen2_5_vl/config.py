"""Qwen2.5-VL's config.json, flat as it was published or nested as transformers 5 writes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_vl.errors import InputError
from megatron_vl.models.common.decoder_config import Width, first
from megatron_vl.models.common.media_config import PatchKeys, read_vision_language
from megatron_vl.models.spec import JsonGrounding, ModelSpec
from megatron_vl.models.tower_spec import VisionSpec
from megatron_vl.typed import Name, Positive

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "3B": (36, 2048),
    "7B": (28, 3584),
    "32B": (64, 5120),
    "72B": (80, 8192),
}
# arXiv 2502.13923, section 2.2.1; the keys are those of QwenLM's cookbooks/spatial_understanding.
GROUNDING = JsonGrounding(point="point_2d", box="bbox_2d", label="label")


class _Vision(PatchKeys):
    """vision_config."""

    hidden_size: Width
    intermediate_size: Width
    out_hidden_size: Width
    window_size: Width  # pixels a side
    fullatt_block_indexes: list[Annotated[int, Field(ge=0, le=10_000)]]
    tokens_per_second: Positive
    hidden_act: Name = "silu"


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json of Qwen2.5-VL.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return read_vision_language(config, _vision, GROUNDING)


def _vision(config: dict, decoder_hidden: int) -> VisionSpec:
    keys = first(_Vision, config, {"in_channels": config.get("in_chans")}, at="vision_config")
    cell = keys.patch_size * keys.spatial_merge_size
    if keys.window_size < cell:
        raise InputError(
            f"config.json's window_size is {keys.window_size} pixels; a window holds at least one "
            f"token of {cell} x {cell} pixels."
        )
    full = tuple(sorted(set(keys.fullatt_block_indexes)))
    if full and full[-1] >= keys.depth:
        raise InputError(
            f"config.json's fullatt_block_indexes {list(full)} name a layer that a tower of "
            f"{keys.depth} has not."
        )
    return VisionSpec(
        **keys.shared(),
        hidden_size=keys.hidden_size,
        ffn_hidden_size=keys.intermediate_size,
        out_hidden_size=keys.out_hidden_size,
        activation=keys.hidden_act,
        gated=True,
        normalization="RMSNorm",
        window_cells=keys.window_size // keys.spatial_merge_size // keys.patch_size,
        full_attention_layers=full,
        tokens_per_second=keys.tokens_per_second,
    )
