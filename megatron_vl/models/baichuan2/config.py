"""config.json of Baichuan2-7B, and what tells it from its relatives of the same model_type."""

from __future__ import annotations

from dataclasses import replace

from megatron_vl.errors import InputError
from megatron_vl.models.common.decoder_config import (
    Width,
    first,
    read_decoder,
    read_dtype,
    read_text_tokens,
)
from megatron_vl.models.spec import ModelSpec, TokenIds
from megatron_vl.typed import Number, Shape

SIZES = {"7B": (32, 4096)}  # published sizes: (layers, hidden size)
ROPE = {"rope_theta": 10_000.0}  # in the published code alone
FIRST_GENERATION = 64_000  # the vocabulary of Baichuan-7B and Baichuan-13B


class _Keys(Shape):
    """What only Baichuan's config.json has."""

    vocab_size: Width
    max_position_embeddings: Width | None = None
    z_loss_weight: Number = 0.0


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: another Baichuan's, or a key that is missing or unusable, named.
    """
    keys = first(_Keys, config)
    if keys.vocab_size == FIRST_GENERATION:
        raise InputError(
            f"vocab_size is {FIRST_GENERATION}, as of Baichuan-7B and Baichuan-13B; only "
            f"Baichuan2-7B is supported."
        )
    if keys.max_position_embeddings is None and "model_max_length" in config:
        raise InputError(
            "there is model_max_length but no max_position_embeddings, as in Baichuan2-13B, whose "
            "attention has ALiBi; only Baichuan2-7B, which has rotary positions, is supported."
        )
    if keys.z_loss_weight:
        raise InputError(
            f"z_loss_weight is {keys.z_loss_weight:g}, a loss that is not supported; set the "
            f"published 0."
        )
    decoder = read_decoder(config, ROPE, multi_axis=False)
    if decoder.num_query_groups != decoder.num_attention_heads:
        raise InputError(
            f"num_key_value_heads is {decoder.num_query_groups}, but every one of the "
            f"{decoder.num_attention_heads} heads has its own key and value; remove it."
        )
    if decoder.tie_word_embeddings:
        raise InputError(
            "tie_word_embeddings is true, but a normalised head is no copy of the embedding; set "
            "the published false."
        )
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config),
        decoder=replace(decoder, qkv_bias=False, normalized_head=True),
        tokens=TokenIds(**read_text_tokens(config)),
    )
