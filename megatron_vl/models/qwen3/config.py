"""config.json of Qwen3."""

from __future__ import annotations

from megatron_vl.models.common.decoder_config import read_decoder, read_dtype, read_text_tokens
from megatron_vl.models.spec import ModelSpec, TokenIds

SIZES = {  # published sizes: (layers, hidden size), to check a name against config.json
    "0.6B": (28, 1024),
    "1.7B": (28, 2048),
    "4B": (36, 2560),
    "8B": (36, 4096),
    "14B": (40, 5120),
    "32B": (64, 5120),
}


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config),
        decoder=read_decoder(config, multi_axis=False, qk_norm=True),
        tokens=TokenIds(**read_text_tokens(config)),
    )
