"""What config.json says of media, in Qwen2-VL and in those after it. No Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from megatron_vl.models.common.decoder_config import (
    TokenId,
    first,
    read_decoder,
    read_dtype,
    read_text_tokens,
)
from megatron_vl.models.spec import Grounding, ModelSpec, TokenIds, VisionSpec
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


class _Tokens(Shape):
    """The ids of what stands for media."""

    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId


def read_vision_language(
    config: dict, read_vision: Callable[[dict, int], VisionSpec], grounding: Grounding | None
) -> ModelSpec:
    """The spec of a parsed config.json with a decoder of three axes and a tower.

    Args:
        read_vision: the tower's spec, of `vision_config` and the decoder's width.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    towers = first(_Towers, config)
    text = towers.text_config
    decoder = read_decoder(text, config, multi_axis=True)
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
            grounding=grounding,
            **read_text_tokens(config, text),
        ),
    )
