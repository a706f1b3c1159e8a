"""config.json of a Qwen3 with experts."""

from __future__ import annotations

from megatron_vl.models.common.decoder_config import read_decoder, read_dtype, read_text_tokens
from megatron_vl.models.common.experts_config import read_experts
from megatron_vl.models.spec import ModelSpec, TokenIds

SIZES = {  # published sizes: (layers, hidden size), to check a name against config.json
    "30B-A3B": (48, 2048),
    "235B-A22B": (94, 4096),
}


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return ModelSpec(
        model_type=config["model_type"],
        dtype=read_dtype(config),
        decoder=read_decoder(
            config, multi_axis=False, qk_norm=True, experts=read_experts(config)
        ),
        tokens=TokenIds(**read_text_tokens(config)),
    )
