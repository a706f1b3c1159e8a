"""Qwen2-VL's config.json, in the flat form it was published in and in transformers 5's nested one.

Flat: the decoder's keys lie at the top, rope under `rope_theta` and `rope_scaling`. Nested: they
lie under `text_config`, rope under `rope_parameters`. Every number the model needs comes from here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megatron_vl.errors import InputError, shown
from megatron_vl.models.spec import DecoderSpec, Grounding, TokenIds, VisionSpec, VLMSpec
from megatron_vl.typed import Name, Number, Positive, Shape, Size, typed

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "2B": (28, 1536),
    "7B": (28, 3584),
    "72B": (80, 8192),
}

# arXiv 2409.12191, section 2.2.1: coordinates within [0, 1000).
GROUNDING = Grounding(
    ref=("<|object_ref_start|>", "<|object_ref_end|>"), box=("<|box_start|>", "<|box_end|>"),
    quad=("<|quad_start|>", "<|quad_end|>"), scale=1000,
)

Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Decoder(Shape):
    """The decoder's keys, wherever they lie."""

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width | None = None
    intermediate_size: Width
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    rms_norm_eps: Positive
    max_position_embeddings: Size
    initializer_range: Number = 0.02
    use_sliding_window: bool = False
    hidden_act: Name = "silu"


class _Towers(Shape):
    """The tables within."""

    vision_config: dict
    text_config: dict = Field(default_factory=dict)


class _Whole(Shape):
    """What stands beside the towers."""

    dtype: Name = "bfloat16"
    tie_word_embeddings: bool = False


class _Rope(Shape):
    """Of rope_parameters, of rope_scaling or of the decoder's own keys."""

    rope_type: Name = "default"
    type: Name = "default"
    rope_theta: Positive
    mrope_section: Annotated[list[Width], Field(min_length=3, max_length=3)]


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


class _Tokens(Shape):
    """The ids of special tokens."""

    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(min_length=1)] | None = None
    pad_token_id: TokenId | None = None


def _first(kind: type, *sections: object, at: str = "") -> Any:
    """A `kind` of several tables of config.json; of a key the first that has it wins.

    Raises:
        InputError: a key is missing or not of its type.
    """
    found: dict = {}
    for section in sections:
        if isinstance(section, dict):
            found = {k: v for k, v in section.items() if v is not None} | found
    try:
        return typed(kind, found, at)
    except ValueError as error:
        raise InputError(f"{error}; copy the model's own config.json.") from error


def read_config(config: dict) -> VLMSpec:
    """The spec of a parsed config.json of Qwen2-VL.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    towers = _first(_Towers, config)
    text = towers.text_config
    decoder = _decoder(text, config)
    older = [{"dtype": section.get("torch_dtype")} for section in (config, text)]
    return VLMSpec(
        model_type=config["model_type"],
        dtype=_first(_Whole, older[0], config, text, older[1]).dtype.removeprefix("torch."),
        decoder=decoder,
        vision=_vision(towers.vision_config, decoder.hidden_size),
        tokens=_tokens(_first(_Tokens, config, text)),
    )


def _decoder(*sections: dict) -> DecoderSpec:
    keys = _first(_Decoder, *sections)
    rope = _first(
        _Rope, *(section.get(name) for section in sections
                 for name in ("rope_parameters", "rope_scaling")), *sections,
    )
    for name in ("rope_type", "type"):
        kind = getattr(rope, name)
        if kind not in ("default", "mrope"):
            raise InputError(
                f"{name} of rope_scaling (or rope_parameters) is {shown(repr(kind))}, which is not "
                f"supported; train with the published 'mrope' and set it for inference."
            )
    if keys.use_sliding_window:
        raise InputError(
            "use_sliding_window is true, which is not supported; set it to false if the model "
            "was published so."
        )
    if keys.hidden_act != "silu":
        raise InputError(
            f"hidden_act is {shown(repr(keys.hidden_act))}; Qwen2-VL's decoder has silu."
        )
    hidden, heads = keys.hidden_size, keys.num_attention_heads
    if hidden % heads:
        raise InputError(f"hidden_size {hidden} is not a multiple of its {heads} heads.")
    # Older files of the nested form keep the tie under text_config; either place ties.
    ties = [_first(_Whole, section).tie_word_embeddings for section in sections]
    return DecoderSpec(
        num_layers=keys.num_hidden_layers,
        hidden_size=hidden,
        ffn_hidden_size=keys.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=keys.num_key_value_heads or heads,
        head_dim=hidden // heads,
        vocab_size=keys.vocab_size,
        tie_word_embeddings=any(ties),
        norm_eps=keys.rms_norm_eps,
        rope_theta=rope.rope_theta,
        mrope_section=tuple(rope.mrope_section),
        qkv_bias=True,
        max_position_embeddings=keys.max_position_embeddings,
        init_std=keys.initializer_range,
    )


def _vision(config: dict, decoder_hidden: int) -> VisionSpec:
    channels = {"in_channels": config.get("in_chans")}
    keys = _first(_Vision, config, channels, at="vision_config")
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


def _tokens(keys: _Tokens) -> TokenIds:
    eos = keys.eos_token_id
    return TokenIds(
        image=keys.image_token_id,
        video=keys.video_token_id,
        vision_start=keys.vision_start_token_id,
        vision_end=keys.vision_end_token_id,
        bos=keys.bos_token_id,
        eos=eos[0] if isinstance(eos, list) else eos,
        pad=keys.pad_token_id,
        grounding=GROUNDING,
    )
