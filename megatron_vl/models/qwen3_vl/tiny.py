"""A tiny Qwen3-VL."""

from __future__ import annotations

from megatron_vl.models.common.deepstack.tiny import DEFAULTS, deepstack_model_files
from megatron_vl.models.tiny import TinySizes

__all__ = ["DEFAULTS", "files"]


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights."""
    return deepstack_model_files(
        sizes, model_type="qwen3_vl", architecture="Qwen3VLForConditionalGeneration"
    )
