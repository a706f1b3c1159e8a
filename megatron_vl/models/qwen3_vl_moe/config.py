"""config.json of a Qwen3-VL with experts."""

from __future__ import annotations

from megatron_vl.models.common.deepstack.config import read_deepstack
from megatron_vl.models.spec import ModelSpec

SIZES = {  # published sizes: (language layers, hidden size), to check a name against config.json
    "30B-A3B": (48, 2048),
    "235B-A22B": (94, 4096),
    "A3B": (48, 2048),  # the same by the names that Pai-Megatron-Patch's launchers have
    "A22B": (94, 4096),
}


def read_config(config: dict) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        InputError: a key that is missing or unusable, named.
    """
    return read_deepstack(config, with_experts=True)
