"""Qwen3-VL's config.json."""

from __future__ import annotations

from megatron_vl.models.common.deepstack.config import read_deepstack
from megatron_vl.models.spec import ModelSpec

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "2B": (28, 2048),
    "4B": (36, 2560),
    "8B": (36, 4096),
    "32B": (64, 5120),
}


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return read_deepstack(config, with_experts=False)
