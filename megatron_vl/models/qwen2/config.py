"""config.json of Qwen2 and Qwen2.5, which name themselves alike."""

from __future__ import annotations

from megatron_vl.errors import InputError
from megatron_vl.models.common.decoder_config import read_decoder, read_dtype, read_text_tokens
from megatron_vl.models.spec import ModelSpec, TokenIds

SIZES = {  # published sizes: (layers, hidden size), to check a name against config.json
    "0.5B": (24, 896),
    "1.5B": (28, 1536),
    "3B": (36, 2048),
    "7B": (28, 3584),
    "14B": (48, 5120),
    "32B": (64, 5120),
    "72B": (80, 8192),
}


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    if "vision_config" in config:
        raise InputError(
            f"model_type is {config['model_type']}, a language model alone, but there is a "
            f"vision_config; take config.json from the model's own repository."
        )
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config),
        decoder=read_decoder(config, multi_axis=False),
        tokens=TokenIds(**read_text_tokens(config)),
    )
