"""What config.json says of a decoder of Qwen2 or Qwen3, whichever family it is part of.

transformers wrote the keys in two forms: flat, with rope under `rope_theta` and `rope_scaling`, and
since version 5 with rope under `rope_parameters`. A model with towers may have them in a table.
No Megatron-Core.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megatron_vl.errors import InputError, shown
from megatron_vl.models.decoder_spec import DecoderSpec, ExpertsSpec
from megatron_vl.typed import Name, Number, Positive, Shape, Size, typed

Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Tokens(Shape):
    """Ids of a tokenizer's own marks."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(min_length=1)] | None = None
    pad_token_id: TokenId | None = None


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
    layer_types: list[Name] | None = None
    head_dim: Width | None = None
    attention_bias: bool = False  # Qwen3's; Qwen2 has no such key
    hidden_act: Name = "silu"


class _Whole(Shape):
    """What is said of the whole model."""

    dtype: Name = "bfloat16"
    tie_word_embeddings: bool = False


class _Rope(Shape):
    """Of rope_parameters, of rope_scaling or of the decoder's own keys."""

    rope_type: Name = "default"
    type: Name = "default"
    rope_theta: Positive


class _MultiRope(_Rope):
    """With positions in three axes."""

    mrope_section: Annotated[list[Width], Field(min_length=3, max_length=3)]
    mrope_interleaved: bool | None = None  # None: as the family's models were published


_PLAIN = {"type", "rope_type", "rope_theta"}  # of rope_scaling, what scales nothing


def first(kind: type, *sections: object, at: str = "") -> Any:
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


def read_dtype(*sections: dict) -> str:
    """Of the published weights, by the name that torch has for it."""
    older = [{"dtype": section.get("torch_dtype")} for section in sections]
    ordered = [older[0], *sections, *older[1:]]
    return first(_Whole, *ordered).dtype.removeprefix("torch.")


def read_tied(*sections: dict) -> bool:
    """Whether the output layer is the embedding, by the first table that says."""
    return first(_Whole, *sections).tie_word_embeddings


def read_text_tokens(*sections: dict) -> dict[str, int | None]:
    """`TokenIds`' bos, eos (the first of several) and pad."""
    keys = first(_Tokens, *sections)
    eos = keys.eos_token_id
    return {"bos": keys.bos_token_id, "pad": keys.pad_token_id,
            "eos": eos[0] if isinstance(eos, list) else eos}


def read_decoder(
    *sections: dict, multi_axis: bool, qk_norm: bool = False, interleaved: bool = False,
    experts: ExpertsSpec | None = None, tied: bool | None = None,
) -> DecoderSpec:
    """The decoder of config.json's tables; of a key the first that has it wins.

    Args:
        multi_axis: whether positions have three axes (`mrope_section`), or one.
        qk_norm: whether it is Qwen3's: queries and keys normalised, without biases, in heads of a
            width of their own.
        interleaved: whether the axes take turns at the channels of a head.
        experts: of every layer, in the place of its MLP.
        tied: whether the output layer is the embedding; None: it is if any table says so.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    keys = first(_Decoder, *sections)
    rope = first(
        _MultiRope if multi_axis else _Rope,
        *(section.get(name) for section in sections
          for name in ("rope_parameters", "rope_scaling")), *sections,
    )
    scaling = [section.get("rope_scaling") for section in sections]
    if not multi_axis and any(isinstance(one, dict) and one.keys() - _PLAIN for one in scaling):
        raise InputError(
            "rope_scaling is set, which is not supported; remove it to train, and set it for "
            "inference."
        )
    known = ("default", "mrope") if multi_axis else ("default",)
    for name in ("rope_type", "type"):
        kind = getattr(rope, name)
        if kind not in known:
            raise InputError(
                f"{name} of rope_scaling (or rope_parameters) is {shown(repr(kind))}, which is not "
                f"supported; train with the published {known[-1]!r} and set it for inference."
            )
    if multi_axis and rope.mrope_interleaved not in (None, interleaved):
        raise InputError(
            f"mrope_interleaved of rope_scaling (or rope_parameters) is "
            f"{str(rope.mrope_interleaved).lower()}; no model of this type was published so, and "
            f"transformers reads it as {str(interleaved).lower()}."
        )
    if keys.layer_types is not None and set(keys.layer_types) != {"full_attention"}:
        raise InputError(
            f"layer_types has {shown(', '.join(sorted(set(keys.layer_types))))}; only "
            f"full_attention is supported."
        )
    if keys.use_sliding_window:
        raise InputError(
            "use_sliding_window is true, which is not supported; set it to false if the model "
            "was published so."
        )
    if keys.hidden_act != "silu":
        raise InputError(f"hidden_act is {shown(repr(keys.hidden_act))}; this decoder has silu.")
    head_dim = _given_head_width(keys) if qk_norm else _head_width(keys)
    if head_dim % 2:
        raise InputError(f"the heads are {head_dim} wide; rotary embedding needs an even width.")
    if tied is None:
        # Older files of the nested form keep the tie under text_config; either place ties.
        tied = any(first(_Whole, section).tie_word_embeddings for section in sections)
    return DecoderSpec(
        num_layers=keys.num_hidden_layers,
        hidden_size=keys.hidden_size,
        ffn_hidden_size=keys.intermediate_size,
        num_attention_heads=keys.num_attention_heads,
        num_query_groups=keys.num_key_value_heads or keys.num_attention_heads,
        head_dim=head_dim,
        vocab_size=keys.vocab_size,
        tie_word_embeddings=tied,
        norm_eps=keys.rms_norm_eps,
        rope_theta=rope.rope_theta,
        rope_sections=tuple(rope.mrope_section) if multi_axis else (head_dim // 2,),
        qkv_bias=not qk_norm,
        max_position_embeddings=keys.max_position_embeddings,
        init_std=keys.initializer_range,
        qk_norm=qk_norm,
        rope_interleaved=interleaved,
        experts=experts,
    )


def _head_width(keys: _Decoder) -> int:
    """Of Qwen2, whose heads together are as wide as the residual stream."""
    hidden, heads = keys.hidden_size, keys.num_attention_heads
    if hidden % heads:
        raise InputError(f"hidden_size {hidden} is not a multiple of its {heads} heads.")
    if keys.head_dim not in (None, hidden // heads):
        raise InputError(
            f"head_dim is {keys.head_dim}, but hidden_size {hidden} over {heads} heads is "
            f"{hidden // heads}; only that is supported."
        )
    return hidden // heads


def _given_head_width(keys: _Decoder) -> int:
    """Of Qwen3."""
    if keys.head_dim is None:
        raise InputError("head_dim is missing; copy the model's own config.json.")
    if keys.attention_bias:
        raise InputError(
            "attention_bias is true, which is not supported; no Qwen3 was published so."
        )
    return keys.head_dim
